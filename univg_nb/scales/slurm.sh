#!/bin/bash
# The course at SCALE=full over several nodes, pre-emption handled.
# Run by the authors on two nodes without GPUs (Slurm 22.05, SCALE=smoke), never on a
# cluster. Adapt the #SBATCH lines to yours.
#
#   sbatch --nodes 2 univg_nb/scales/slurm.sh full --set launch.written_for=16 \
#       --set sft.gradient_accumulation_steps=2 --set grpo.gradient_accumulation_steps=1
#
# (The 24 rows of the paper's stage 1 do not divide over 16 GPUs; this takes 32.)
#
# The notebooks run on the first node. Each training cell starts its processes on all
# nodes by srun and torchrun's rendezvous (univg_nb/launch/launcher.py). Two minutes before the
# time limit Slurm sends SIGUSR1 to this script, which stops the runner: all processes
# write a checkpoint after the update at hand, the job is queued again and goes on from
# there. Pre-emption and scancel send SIGTERM to the processes themselves, which save in
# the same way if their update ends within Slurm's KillWait; whether the job comes back
# is then Slurm's business (PreemptMode=REQUEUE).
#SBATCH --job-name=univg-nb
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -u
SCALE=${1:-full}
NODES=${SLURM_JOB_NUM_NODES:-1}
GPUS=$((NODES * ${SLURM_GPUS_ON_NODE:-8}))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2

.venv/bin/python -m univg_nb run --scale "$SCALE" --run-dir "runs/$SCALE" \
    --set launch.processes="$GPUS" --set launch.nodes="$NODES" \
    --set launch.port="${PORT:-29500}" "${@:2}" &
child=$!
again=0
trap 'kill -TERM "$child"' TERM
trap 'again=1; kill -TERM "$child"' USR1
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # wait returns when the signal comes
    wait "$child"
    code=$?
done
if [ "$again" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
