#!/usr/bin/env bash
# What launch/tpu_vm.sh asks of a worker, run in the folder where `install` put the repository:
#
#   install                   makes .venv with the TPU build of JAX (uv brings the Python that the image may lack)
#   exec COMMAND...           runs a command in .venv
#   start RESTARTS COMMAND... runs it in the background, its output in run.log; if it fails, up to RESTARTS times again
#   stop                      SIGTERM to it, and no more restarts
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH

is_running() { [[ -f run.pid ]] && kill -0 -- "-$(cat run.pid)" 2> /dev/null; }

action=$1
shift
case $action in
  install)
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --seed --python 3.11 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python \
      -r requirements.txt -r requirements-tpu.txt -r requirements-gcs.txt huggingface_hub
    python -c 'import jax; print("JAX", jax.__version__)'
    ;;
  exec)
    exec "$@"
    ;;
  start)
    if is_running; then
      echo "a command runs here already; stop it first" >&2
      exit 1
    fi
    # A session of its own, so that it outlives this connection and `stop` reaches all of it.
    nohup setsid "$PWD/launch/on_worker.sh" repeat "$@" >> run.log 2>&1 < /dev/null &
    echo $! > run.pid
    ;;
  repeat)
    restarts=$1
    shift
    for ((attempt = 0; attempt <= restarts; attempt++)); do
      echo "attempt $attempt, $(date -u): $*"
      if "$@"; then exit 0; fi
      sleep "${RESTART_SECONDS:-10}"
    done
    exit 1
    ;;
  stop)
    if is_running; then kill -TERM -- "-$(cat run.pid)"; fi
    ;;
  *)
    echo "no action '$action'" >&2
    exit 2
    ;;
esac
