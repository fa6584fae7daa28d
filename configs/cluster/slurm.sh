#!/bin/bash
# One job of `make submit VERB=stage2 SCALE=7b NODES=10 GPUS=8`: a process for each GPU. What the cluster wants beside
# (partition, account, modules) is given by SBATCH="--partition=..." or written here. Arguments: stages.NAME and its own.
#SBATCH --time=24:00:00
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# a job that is started again goes on, also one that was told FRESH=1
command=()
for word in "$@"; do
  [[ $word == --fresh && ${SLURM_RESTART_COUNT:-0} != 0 ]] || command+=("$word")
done

# shellcheck disable=SC2016  # for each task to fill in
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m "$@"'
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "$task" task "${command[@]}" &
step=$!

# USR1: five minutes are left, or the job is preempted. It reaches every task, and ends this wait, not the tasks
trap 'kill -USR1 "$step" 2>/dev/null' USR1 TERM
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
status=$?

# 75: all is saved, and the machine asked for the stop; a job that its user has cancelled stays so
if [[ $status == 75 && $(scontrol show job "$SLURM_JOB_ID") != *JobState=CANCELLED* ]]; then
  echo "stopped by a signal; job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
