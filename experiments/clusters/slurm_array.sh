#!/bin/bash
# The same training with four seeds, a job each: FOLDER/seed_0.ipynb and its run FOLDER/seed_0, and so on.
#   sbatch experiments/clusters/slurm_array.sh experiments/train.ipynb FOLDER experiments/configs/quickstart.yaml [key=value ...]
#SBATCH --job-name=vla_bench
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x_%A_%a.log
source experiments/clusters/slurm_requeue.sh
notebook=$1 config=$3 seed=$SLURM_ARRAY_TASK_ID
folder=$(realpath -m "$2")
shift 3
mkdir -p "$folder"
run "$notebook" "$folder/seed_$seed.ipynb" -p config "$config" -p output "$folder/seed_$seed" -p overrides "seed=$seed $*"
