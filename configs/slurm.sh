#!/bin/bash
# Train on several machines under Slurm, and resume by itself after a preemption or the time limit.
#   sbatch configs/slurm.sh --config configs/skin.yaml --output_dir /shared/outputs/skin
# The output folder, the data and this folder must be on storage that all machines share.
#SBATCH --job-name=train_sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end this script gets SIGTERM, and passes it on: the run saves after the step in progress.
#SBATCH --signal=B:TERM@120
set -uo pipefail

STOPPED=75  # exit code of a run that saved and stopped after a signal; `accelerate launch` turns it into 1
GPUS="${SLURM_GPUS_ON_NODE:-1}"
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS MAIN

# The run makes this file when it stopped and could not save: queued again, it would do the same steps for ever.
export UNSAVED_MARKER="$PWD/.unsaved-$SLURM_JOB_ID"
rm -f "$UNSAVED_MARKER"

signals=0 run=
trap 'signals=$((signals + 1)); [ -z "$run" ] || kill -TERM "$run"' TERM

# One launcher on each machine; SLURM_NODEID is the machine's number. One that fails ends the others.
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file configs/accelerate/multi_node.yaml --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" \
    train_sft.py "$@"' train "$@" &
run=$!
[ "$signals" -eq 0 ] || kill -TERM "$run"  # it came before there was a run to pass it on to

# A signal ends `wait`, and not the run: its exit code comes from a `wait` that no signal ended.
while seen=$signals; wait "$run"; code=$?; [ "$signals" -ne "$seen" ]; do :; done

# With resume_from_checkpoint: auto the next start resumes from the newest complete checkpoint. A failed run is not requeued.
if [ -e "$UNSAVED_MARKER" ]; then
  rm -f "$UNSAVED_MARKER"
  echo "stopped without a checkpoint, exit code $code: not queued again"
elif [ "$code" -eq "$STOPPED" ] || { [ "$signals" -gt 0 ] && [ "$code" -ne 0 ]; }; then
  echo "stopped, exit code $code: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
