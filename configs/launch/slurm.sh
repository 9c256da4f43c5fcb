#!/bin/bash
# sbatch configs/launch/slurm.sh configs/data/cifar100_aug.yaml configs/tier/paper.yaml configs/variant/baseline.yaml data.root=...
# Starts one process for each GPU of each node. A job that is preempted saves, is queued again, and continues. One that
# runs out of time saves; submit the same command again to continue it.
#SBATCH --job-name=seqjepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

nodes=${SLURM_JOB_NUM_NODES:?run it by sbatch}
processes=$((nodes * ${SLURM_GPUS_ON_NODE:-1}))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
accelerate=$(python -c 'import seqjepa.configs as c; print(c.__path__[0])')/accelerate/multi_node.yaml

# bash runs on each node, where SLURM_NODEID is that of the node; with exec, signals reach the launcher.
# Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch. With --kill-on-bad-exit=1 the first process to
# leave after a signal would have another one sent to those that still save; whoever hangs instead is ended by --wait.
srun --kill-on-bad-exit=0 --wait=300 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c 'exec accelerate launch --config_file "$5" \
    --num_machines "$1" --num_processes "$2" --main_process_ip "$3" --main_process_port "$4" \
    --machine_rank "$SLURM_NODEID" --module seqjepa.engine.train "${@:6}"' launch \
    "$nodes" "$processes" "$first" "$((20000 + SLURM_JOB_ID % 20000))" "$accelerate" "$@" run.resume=auto || {
    code=$?
    # Slurm does not queue a preempted job again that leaves before its GraceTime is over
    if [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
