#!/usr/bin/env bash
# Builds the worker's image, pushes it, and has the coordinators use it from now on.
set -euo pipefail

usage() {
    cat <<'END'
usage: updateWorker.sh [--worker-app APP] [--coord-app APP] [--label LABEL] [--dry-run]

Builds the worker's image as fly.toml.basher says, pushes it to the worker app under LABEL (the time and the
commit, where that is not said), and sets WORKER_IMAGE of the coordinators to it, which restarts them: runs that
are under way end first, and machines of the old image are replaced. Stops at the first error.

The apps are those of fly.toml.basher and fly.toml where they are not named. --dry-run prints the commands, and
runs none of them.
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
# flyctl tells where it pushed to in a line of its own. All it says is passed on, but not by tee: that opens
# /dev/stderr anew, and so empties a log that this is appended to.
image=$("${build[@]}" 2>&1 | while IFS= read -r line || [ "$line" ]; do
    printf '%s\n' "$line" >&2
    case $line in "image: "*) echo "${line#image: }" ;; esac
done | tail -n 1)
[ "$image" ] || { echo "updateWorker.sh: flyctl did not say what it pushed; nothing was set" >&2; exit 1; }
fly secrets set --app "$coord_app" "WORKER_IMAGE=$image"
echo "the coordinators of $coord_app now use $image"
