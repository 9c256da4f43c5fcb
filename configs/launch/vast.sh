#!/bin/bash
# vastai create instance OFFER --image pytorch/pytorch --disk 50 --ssh --onstart configs/launch/vast.sh \
#   --env "-e SOURCE=git+https://... -e MIRROR=hf://buckets/USER/runs -e HF_TOKEN=$HF_TOKEN"
# What a machine of Vast's runs when it starts. However that ends, the machine is destroyed; what it said is then in
# MIRROR/logs, and another machine with the same words goes on from the mirror (docs/remote.md).

export PATH="$HOME/seqjepa/bin:$PATH" PIP_BREAK_SYSTEM_PACKAGES=1 HOURS="${HOURS:-24}"
log=$HOME/seqjepa.log
exec > >(tee -a "$log") 2>&1

setup() {
  set -e
  : "${SOURCE:?what pip installs, such as git+https://...}" "${MIRROR:?where checkpoints and results go}"
  command -v gcc > /dev/null || { apt-get update -q && apt-get install -qy gcc libc6-dev; }  # for torch.compile
  pip install --quiet uv
  uv venv --quiet --clear --python 3.12 --managed-python "$HOME/seqjepa"
  uv pip install --quiet --python "$HOME/seqjepa" "seqjepa[train] @ $SOURCE"
}

train() {
  set -f  # brackets in words are lists, not patterns
  exec seqjepa train run.device=cuda run.resume=auto run.name=auto run.mirror="$MIRROR" run.max_hours="$HOURS" \
    run.max_idle=30 run.price="${PRICE:-0.5}" ${WANDB_API_KEY:+tracking.wandb=online} \
    ${SEQJEPA_WORDS:-configs/data/cifar100_aug.yaml configs/tier/gate30.yaml configs/variant/baseline.yaml data.root=data data.download=true}
}

send_log() {  # the last words would be lost with the machine
  python3 -c 'import fsspec' 2> /dev/null || pip install --quiet fsspec huggingface_hub  # the set-up has failed
  timeout 5m python3 -c 'import sys, fsspec
files, place = fsspec.url_to_fs(sys.argv[2])
files.makedirs(place.rpartition("/")[0], exist_ok=True)
files.put_file(sys.argv[1], place)' "$log" "$MIRROR/logs/$CONTAINER_ID.txt"
}

destroy() {  # Vast sets CONTAINER_ID, and CONTAINER_API_KEY, a key for this machine alone
  trap '' TERM HUP INT
  echo "exit code $1: destroying this machine"
  sleep 1  # for tee
  send_log
  while true; do  # this script ends with the machine
    command -v vastai > /dev/null || pip install --quiet vastai
    vastai destroy instance "$CONTAINER_ID" -y --api-key "$CONTAINER_API_KEY"
    sleep "${AGAIN:-60}"
  done
}

within() {  # a time limit, while signals are still noticed
  timeout --kill-after=5m "$1" bash -c "$2" &
  wait $!
}

export -f setup train
trap 'destroy $?' EXIT
trap 'kill -TERM $!; wait $!; exit 143' TERM HUP INT
within 1h setup && within "$((${HOURS%.*} + 2))h" train
