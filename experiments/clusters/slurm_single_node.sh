#!/bin/bash
# A notebook on one node, a training process per GPU. Options of sbatch win over those below.
#   sbatch experiments/clusters/slurm_single_node.sh experiments/train.ipynb OUT.ipynb -p config experiments/configs/quickstart.yaml
#SBATCH --job-name=vla_bench
#SBATCH --nodes=1
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
