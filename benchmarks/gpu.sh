#!/usr/bin/env bash
# Measure this project on a machine with one CUDA GPU, in one command that ends within 7 minutes whatever happens.
#
#     bash benchmarks/gpu.sh [OUTPUT [DATA]]
#
# OUTPUT is the folder for the results, by default benchmarks/results/gpu-<card>-<date>: one JSON file a part, and
# table.txt. DATA is a data directory made by preprocess.py; it may also be given as the environment variable DATA, and
# is gpu_data/ where that exists. Without one, synthetic patients are measured.
#
# The machine needs Python 3.11 or later with torch, Triton, NumPy, pyarrow, psutil, rich, matplotlib, scikit-learn,
# SciPy, PyYAML, Jinja2, pytest and hypothesis; neither Polars nor webdataset nor fsspec, no network and no installation.
# So prepare the data elsewhere and carry the folder along (git ignores gpu_data/):
#
#     python preprocess.py set-a --format physionet2012 --labels Outcomes-a.txt --output gpu_data
#
# Environment variables:
#     PYTHON        interpreter, by default python3
#     DATA          data directory, where the second argument is left out
#     PARTS         parts to run, by default all: checks speed launches prefetch training loop
#     LIMIT_<part>  time limit of a part in seconds, e.g. LIMIT_speed=200
#     DEADLINE      seconds after which no part may run any longer, by default 410
#     GPU_COMMIT    commit to note, where the machine has no git
#     GPU_SH_QUICK  1 = small sizes and short times: a rehearsal of less than a minute on a CPU
set -u

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
python=${PYTHON:-python3}
out=${1:+$(absolute "$1")}
data=${2:-${DATA:-}}
data=${data:+$(absolute "$data")}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

SECONDS=0
deadline=${DEADLINE:-410}
quick=()
[ "${GPU_SH_QUICK:-0}" = 1 ] && quick=(--quick)

GPU_CARD=$(timeout 10 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
GPU_DRIVER=$(timeout 10 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
GPU_COMMIT=${GPU_COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
export GPU_CARD GPU_DRIVER GPU_COMMIT
# Small operations on a CPU that others use too are far slower on several threads than on one.
[ -z "$GPU_CARD" ] && [ ! -e /dev/nvidia0 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

name=$(printf %s "${GPU_CARD:-cpu}" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
out=${out:-$PWD/benchmarks/results/gpu-$name-$(date -u +%F)}
mkdir -p "$out" || exit 1
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
stopped= running=
trap 'stopped=1; [ -n "$running" ] && kill "$running" 2>/dev/null' INT TERM

# Run a command with a time limit of its own, in the background so that a signal to this script is heard at once.
limited() { # SECONDS LOG COMMAND...
    timeout --kill-after=4 "$1" "${@:3}" >"$2" 2>&1 &
    running=$!
    wait "$running"
    local code=$?
    [ -n "$stopped" ] && wait "$running" # a signal ended the first wait, not the command
    running=
    return "$code"
}

part() { # NAME SECONDS
    case " ${PARTS:-$1} " in *" $1 "*) ;; *) return ;; esac
    rm -f "$out/$1.json"
    local limit=LIMIT_$1 left=$((deadline - SECONDS - 5)) started=$SECONDS code
    limit=${!limit:-$2}
    [ "$limit" -gt "$left" ] && limit=$left
    if [ -n "$stopped" ] || [ "$limit" -lt 2 ]; then
        echo "$1: left out, no time is left"
        return
    fi
    echo "$1: at most $limit s ..."
    limited "$limit" "$scratch/$1.log" "$python" -m "benchmarks.gpu.$1" "$out/$1.json" \
        --data_dir "$data" --ends_at $(($(date +%s) + limit)) ${quick[@]+"${quick[@]}"}
    code=$?
    timeout 10 "$python" -m benchmarks.gpu.results "$out/$1.json" --part "$1" --exit_code "$code" \
        --seconds $((SECONDS - started)) --limit "$limit" --log "$scratch/$1.log"
}

if [ -z "$data" ] && [ -e gpu_data/manifest.json ]; then
    data=$PWD/gpu_data
fi
if [ -z "$data" ]; then
    data=$scratch/data
    echo "data: made up, for DATA was not given"
    limited 40 "$scratch/data.log" "$python" -m benchmarks.gpu.data "$data" ${quick[@]+"${quick[@]}"} ||
        tail -n 3 "$scratch/data.log"
fi

part checks 95
part speed 115
part launches 45
part prefetch 80
part training 50
part loop 25

echo
timeout 10 "$python" -m benchmarks.gpu.table "$out" | tee "$out/table.txt"
