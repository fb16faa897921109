#!/bin/bash
# The course at SCALE=full over several nodes, pre-emption handled.
# Never run by the authors: they had no cluster. Adapt the #SBATCH lines to yours.
#
#   sbatch --nodes 2 univg_nb/scales/slurm.sh full --set launch.written_for=16 \
#       --set sft.gradient_accumulation_steps=2 --set grpo.gradient_accumulation_steps=1
#
# (The 24 rows of the paper's stage 1 do not divide over 16 GPUs; this takes 32.)
#
# The notebooks run on the first node. Each training cell starts its processes on all
# nodes by srun and torchrun's rendezvous (univg_nb/launch.py). Two minutes before the
# time limit, and at pre-emption, Slurm sends SIGTERM to this script: it goes to the
# runner, from there to every process, which writes a checkpoint after the update at
# hand. Then the job is queued again and goes on from there.
#SBATCH --job-name=univg-nb
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u
SCALE=${1:-full}
NODES=${SLURM_JOB_NUM_NODES:-1}
GPUS=$((NODES * ${SLURM_GPUS_ON_NODE:-8}))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2

.venv/bin/python -m univg_nb.run_notebooks --scale "$SCALE" --run-dir "runs/$SCALE" \
    --set launch.processes="$GPUS" --set launch.nodes="$NODES" \
    --set launch.port="${PORT:-29500}" "${@:2}" &
child=$!
stopped=0
trap 'stopped=1; kill -TERM "$child"' TERM
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # wait returns when the signal comes
    wait "$child"
    code=$?
done
if [ "$stopped" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
