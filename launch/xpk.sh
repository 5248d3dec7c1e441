#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: edit the lines down to the empty one, then
#   bash launch/xpk.sh               # further arguments go to XPK: --dry-run, --spot
#   bash launch/xpk.sh --rehearse=2  # no cluster: train.py with the same arguments, on this machine
# docs/launch.md has what you see then, and how to stop it. XPK 1.16: pip install xpk
CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-a
TPU=v5p-128  # 64 chips on 16 hosts, the mesh of configs/mixtral_8x7b.py
NAME=mixtral-8x7b
# XPK adds this folder to the base image. Or name an image that holds the folder and its packages:
# IMAGE=--docker-image=REGISTRY/moe_jax:1 and INSTALL=true.
IMAGE=--base-docker-image=python:3.12
INSTALL="pip install -q -e '.[tpu,gcs]'"
RESTARTS=50  # preemptions count, too
ARGUMENTS=(
  --config=configs/mixtral_8x7b.py
  --workdir=gs://my-bucket/runs/mixtral-8x7b
  --config.data.name=python_stdlib  # for a first trial: text that every Python has
  --config.data.tokenizer=bytes
)

set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --rehearse=* ]]; then
  exec python train.py "${ARGUMENTS[@]}" --multihost "$@"
fi

# A run that SIGTERM has stopped ends with 0, as a finished one does. Kubernetes would take its pod
# for a success, and nobody would start the others again. So the pod that gets the signal ends with
# 143. What XPK restarts by itself: 42 and 127 to 255, which are all signals and jax's 134.
exec xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TPU" --workload="$NAME" "$IMAGE" \
  --max-restarts="$RESTARTS" --restart-on-exit-codes=3,7 --termination-grace-period-seconds=300 \
  --command="set -e; $INSTALL; trap 'kill \$!; wait \$! && exit 143; exit \$?' TERM; \
python train.py$(printf ' %q' "${ARGUMENTS[@]}") --multihost & wait \$!" "$@"
