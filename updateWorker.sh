#!/usr/bin/env bash
# Build the workers' image, push it, and set it in the coordinators.
set -euo pipefail

usage() {
    cat <<'END'
usage: updateWorker.sh [--worker-app APP] [--coord-app APP] [--label LABEL] [--dry-run]

Builds the workers' image according to fly.toml.basher, pushes it to the worker app under LABEL (default: the time
and the commit), and sets WORKER_IMAGE of the coordinators to it. That restarts the coordinators: current runs
finish first, and machines of the old image are replaced. Stops at the first error.

The default apps are those in fly.toml.basher and fly.toml. --dry-run prints the commands without running them.
END
}

app_of() {
    sed -n 's/^app = "\(.*\)"$/\1/p' "$1"
}

cd "$(dirname "$0")"
worker_app=$(app_of fly.toml.basher)
coord_app=$(app_of fly.toml)
label=
dry_run=
while [ $# -gt 0 ]; do
    case $1 in
        --worker-app | --coord-app | --label)
            [ -n "${2:-}" ] || { echo "updateWorker.sh: $1 needs a value" >&2; exit 2; }
            ;;&
        --worker-app) worker_app=$2; shift 2 ;;
        --coord-app) coord_app=$2; shift 2 ;;
        --label) label=$2; shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        -h | --help) usage; exit ;;
        *) usage >&2; exit 2 ;;
    esac
done
if [ -z "$label" ]; then
    label=$(date -u +%Y%m%d-%H%M%S)
    if commit=$(git rev-parse --short HEAD 2>/dev/null); then label+="-$commit"; fi
fi

build=(fly deploy --config fly.toml.basher --app "$worker_app" --build-only --push --image-label "$label")
if [ "$dry_run" ]; then
    echo "${build[*]}"
    echo "fly secrets set --app $coord_app WORKER_IMAGE=IMAGE"
    exit
fi
# flyctl prints the pushed image in a line of its own. Its output is copied to standard error without tee, which would
# open /dev/stderr again, and so truncate a log file that this is appended to.
image=$("${build[@]}" 2>&1 | while IFS= read -r line || [ "$line" ]; do
    printf '%s\n' "$line" >&2
    case $line in "image: "*) echo "${line#image: }" ;; esac
done | tail -n 1)
[ "$image" ] || { echo "updateWorker.sh: flyctl did not print an image; nothing was set" >&2; exit 1; }
fly secrets set --app "$coord_app" "WORKER_IMAGE=$image"
echo "the coordinators of $coord_app now use $image"
