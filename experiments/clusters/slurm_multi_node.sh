#!/bin/bash
# A notebook on several nodes: it runs on the first, and a training process per GPU on all. Options of sbatch win over those below.
#   sbatch experiments/clusters/slurm_multi_node.sh experiments/train.ipynb OUT.ipynb -p config experiments/configs/quickstart.yaml
#SBATCH --job-name=vla_bench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
source experiments/clusters/slurm_requeue.sh
run "$@"
