# Sourced by the job scripts beside it. `run NOTEBOOK OUT ...` is `papermill NOTEBOOK OUT ...`, and when the job has to make
# room (SIGUSR1, which SLURM sends two minutes before the time is used up) the job is started again after it has saved.
run() {
    local out=$2 child status
    trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # to the training processes: they save and end, and so does the notebook
    papermill "$@" --log-output --no-progress-bar &
    child=$!
    while
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null # a signal ends the waiting, not the notebook
    do :; done
    if [ "$status" -ne 0 ] && grep -q '"ename": "RequeueError"' "$out"; then
        echo "saved; the job is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
