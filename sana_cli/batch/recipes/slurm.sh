#!/bin/bash
# A batch on a Ray cluster of its own inside a SLURM job: sbatch slurm.sh jobs.jsonl -m sana-1.6b-1024
# Without Ray, an array of shards does the same: see "SLURM and other schedulers" in the README.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail
head=$(hostname --ip-address | awk '{print $1}')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32)
# The first task is the head of the cluster, the others join it; all end with the job.
srun --overlap bash -c '
  if [ "$SLURM_PROCID" = 0 ]; then exec ray start --head --port=6379 --block
  else sleep 20; exec ray start --address="$0:6379" --block; fi' "$head" &
until ray status --address="$head:6379" > /dev/null 2>&1; do sleep 5; done
sana batch "$@" -o "$SLURM_SUBMIT_DIR/images" --engine ray --address "$head:6379"
