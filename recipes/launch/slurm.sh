#!/usr/bin/env bash
#SBATCH --job-name=orpo-lite
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#
# One training run on the nodes of a SLURM job: one torchrun per node, one process per GPU. No container is needed: the nodes
# share the folder that this is submitted from, and the environment that is active there.
#
#   sbatch recipes/launch/slurm.sh --recipe mistral-qlora memory.gpu_gb=24 data.train=my.jsonl
#   sbatch --nodes=4 --export=ALL,ACCELERATE_CONFIG=recipes/accelerate/ddp-multinode.yaml recipes/launch/slurm.sh ...
#
# Arguments after the script go to python -m orpo_lite.train. Without ACCELERATE_CONFIG torchrun starts the processes; both ways
# are data parallel (DDP).
#
# Two minutes before the time limit, and when SLURM preempts the job, the run receives SIGTERM: it finishes the
# current step, writes a checkpoint and stops; the job is requeued, and the same command resumes from there. torchrun
# gives its processes 30 seconds for it, and a node may fail without warning, so set training.save_minutes as well.

set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:-1}
nodes=${SLURM_JOB_NUM_NODES:-1}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarts on several nodes: torch's store keeps the addresses of the dead
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$gpus} / gpus))}

if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  launch=(accelerate launch --config_file "$ACCELERATE_CONFIG" --num_machines "$nodes"
    --num_processes "$((nodes * gpus))" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
    --rdzv_backend c10d --max_restarts 3)
else
  launch=(torchrun --nnodes "$nodes" --nproc_per_node "$gpus" --max_restarts 3
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT")
fi

stopped=
# shellcheck disable=SC2317,SC2329  # called by the trap
requeue() {
  stopped=yes
  echo "slurm.sh: asked to stop: the run writes a checkpoint, and the job goes into the queue again"
  # srun hands it on to every node
  kill -TERM "$running" 2>/dev/null || true
}
trap requeue TERM

# which node is which is settled at the rendezvous
srun --kill-on-bad-exit=1 "${launch[@]}" -m orpo_lite.train "$@" &
running=$!
status=0
wait "$running" || status=$?
while kill -0 "$running" 2>/dev/null; do # a signal ends wait before the run
  status=0
  wait "$running" || status=$?
done
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
