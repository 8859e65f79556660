#!/usr/bin/env bash
# One Cloud TPU slice from creation to deletion: see usage() below, and launch/README.md for the whole walk.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [options]

  create     orders the slice: --type v5litepod-16 [--version RUNTIME] [--spot] [--queue]
             --queue waits in line for capacity (queued resource); without it, creation fails where there is none
  status     state of the slice and of its place in the queue
  install    copies this clone to every worker and installs it there, with the TPU build of JAX
  run        runs a command on every worker, in the background: ... run --name N --zone Z -- python -m a2d_jax.train ...
             [--restarts 20]: a worker whose command fails runs it again; code 0 (finished, or stopped by SIGTERM) ends it
  stop       sends SIGTERM to what `run` started: training saves, and ends
  logs       fetches the log of every worker into --logs tpu_logs/NAME
  ssh        runs a command on every worker and waits: ... ssh --name N --zone Z -- hf download ...
  delete     deletes the slice; with --queue the one that was created so

  --project PROJECT    default: that of gcloud
  --dry_run            prints every command, runs none
TEXT
}

fail() {
  echo "launch/tpu_vm.sh: $*" >&2
  exit 2
}

command=${1:-}
case $command in
  create | status | install | run | stop | logs | ssh | delete) shift ;;
  -h | --help | "") usage; exit 0 ;;
  *) fail "no command '$command'; see launch/tpu_vm.sh --help" ;;
esac

name='' zone='' project='' type='' version='' logs='' restarts=0 is_spot=false is_queued=false is_dry=false remote=()
while (($#)); do
  case $1 in
    --name | --zone | --project | --type | --version | --logs | --restarts)
      (($# > 1)) || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) is_spot=true; shift ;;
    --queue) is_queued=true; shift ;;
    --dry_run) is_dry=true; shift ;;
    --) shift; remote=("$@"); break ;;
    *) fail "no option '$1'; a command for the workers comes after --" ;;
  esac
done
[[ -n $name && -n $zone ]] || fail "$command needs --name and --zone"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts $restarts is no number"
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")
logs=${logs:-tpu_logs/$name}
root=$(cd "$(dirname "$0")/.." && pwd)

# A command as one could type it.
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  echo "${words[*]}"
}

# Prints a command; runs it unless --dry_run.
run() {
  echo "+ $(quoted "$@")"
  $is_dry || "$@"
}

# Runs an action of launch/on_worker.sh on every worker.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all "--command=a2d/launch/on_worker.sh $(quoted "$@")"
}

# The runtime that Google names for a slice type.
runtime() {
  case $type in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "no runtime is known for --type $type (v5litepod-16 is v5e, v5p-32, v6e-8, v4-8); for another type give --version" ;;
  esac
}

needs_remote() { ((${#remote[@]})) || fail "$command needs a command for the workers after --"; }

case $command in
  create)
    [[ -n $type ]] || fail "create needs --type, such as v5litepod-8"
    version=${version:-$(runtime)}
    options=("${place[@]}" "--accelerator-type=$type")
    if $is_spot; then options+=(--spot); fi
    if $is_queued; then
      run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${options[@]}" "--runtime-version=$version"
    else
      run gcloud compute tpus tpu-vm create "$name" "${options[@]}" "--version=$version"
    fi
    ;;
  status)
    run gcloud compute tpus queued-resources list "${place[@]}" "--filter=name~$name"
    run gcloud compute tpus tpu-vm list "${place[@]}" "--filter=name~$name"
    ;;
  install)
    bundle=$root/tpu_bundle.tar.gz
    run git -C "$root" archive --format=tar.gz "--output=$bundle" HEAD
    run gcloud compute tpus tpu-vm scp "$bundle" "$name:a2d.tar.gz" "${place[@]}" --worker=all
    run rm -f "$bundle"
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
      "--command=mkdir -p a2d && tar -xzf a2d.tar.gz -C a2d"
    on_workers install
    ;;
  run)
    needs_remote
    on_workers start "$restarts" "${remote[@]}"
    ;;
  stop)
    on_workers stop
    ;;
  logs)
    run mkdir -p "$logs"
    if $is_dry; then
      num_workers=1
    else
      num_workers=$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" '--format=value(networkEndpoints.len())')
    fi
    for ((worker = 0; worker < num_workers; worker++)); do
      run gcloud compute tpus tpu-vm scp "$name:a2d/run.log" "$logs/worker$worker.log" "${place[@]}" "--worker=$worker"
    done
    ;;
  ssh)
    needs_remote
    on_workers exec "${remote[@]}"
    ;;
  delete)
    # A slice that came out of the queue goes with its place there.
    if $is_queued; then
      run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --quiet --force
    else
      run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
    fi
    ;;
esac
