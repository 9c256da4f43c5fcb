#!/bin/bash
# vastai create instance OFFER --image pytorch/pytorch --disk 50 --ssh --onstart configs/launch/vast.sh \
#   --env "-e SOURCE=git+https://... -e MIRROR=hf://buckets/USER/runs -e HF_TOKEN=$HF_TOKEN"
# What a machine of Vast's runs when it starts. However that ends, the machine is destroyed; what it said is then in
# MIRROR/logs, and another machine with the same words goes on from the mirror (docs/remote.md).

export PIP_BREAK_SYSTEM_PACKAGES=1 HOURS="${HOURS:-24}"
log=$HOME/seqjepa.log
python=$(command -v python3)
exec > >(trap '' TERM HUP INT; exec tee -a "$log") 2>&1

setup() {
  set -e
  : "${SOURCE:?what pip installs, such as git+https://...}" "${MIRROR:?where checkpoints and results go}"
  command -v gcc > /dev/null || { apt-get update -q; apt-get install -qy gcc libc6-dev; }  # for torch.compile
  pip install --quiet uv
  uv venv --quiet --clear --python 3.12 --managed-python "$HOME/seqjepa"
  uv pip install --quiet --python "$HOME/seqjepa" "seqjepa[train] @ $SOURCE" ${PACKAGES:-}
}

train() {
  set -f  # brackets in words are lists, not patterns
  exec seqjepa train run.device=cuda run.resume=auto run.name=auto run.mirror="$MIRROR" run.max_hours="$HOURS" \
    run.max_idle=30 run.price="${PRICE:-0.5}" ${WANDB_API_KEY:+tracking.wandb=online} \
    ${SEQJEPA_WORDS:-configs/data/cifar100_aug.yaml configs/tier/gate30.yaml configs/variant/baseline.yaml data.root=data data.download=true}
}

tools() {  # of the end; installed first, because the disk may be full then
  pip install --quiet vastai fsspec huggingface_hub ${PACKAGES:-}
}

send_log() {  # the last words would be lost with the machine
  timeout 5m "$python" -c 'import sys, fsspec
files, place = fsspec.url_to_fs(sys.argv[2])
if "://" not in sys.argv[2]:
    files.makedirs(place.rpartition("/")[0], exist_ok=True)
files.put_file(sys.argv[1], place)' "$log" "$MIRROR/logs/$CONTAINER_ID.txt"
}

destroy() {  # Vast sets CONTAINER_ID, and CONTAINER_API_KEY, a key for this machine alone
  trap '' TERM HUP INT PIPE
  echo "exit code $1: destroying this machine"
  sleep 1  # for tee
  send_log
  while true; do  # this script ends with the machine
    command -v vastai > /dev/null || tools
    vastai destroy instance "$CONTAINER_ID" -y --api-key "$CONTAINER_API_KEY"
    sleep "${AGAIN:-60}"
  done
}

within() {  # a time limit, while signals are still noticed
  timeout --kill-after=5m "$1" bash -c "$2" &
  wait $!
}

export -f setup tools train
trap 'destroy $?' EXIT
trap 'kill -TERM $!; wait $!; exit 143' TERM HUP INT
within 10m tools
within 1h setup && PATH="$HOME/seqjepa/bin:$PATH" within "$((${HOURS%.*} + 2))h" train
