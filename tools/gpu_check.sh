#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 10 minutes: the gpu tests and the benchmarks, on a machine where
# nothing can be downloaded. Leaves one JSON with the results, the GPU, versions and the commit.
#
#   tools/gpu_check.sh [--wheels DIR] [--output FILE]
#
# --wheels: a folder of wheels that the machine lacks (megatron-core, psutil, sentencepiece, pytest ...), installed into a
# temporary folder. PyTorch with CUDA must be there. --output: default build/gpu_check.json. Exit 1 when a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels="" output="build/gpu_check.json"
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --output) output=${2:?--output needs a file}; shift 2 ;;
        -h|--help) sed -n '2,9p' "$0" | cut -c3-; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
if [ -n "$wheels" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$PYTHONPATH:$work/site"
fi
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' || {
    echo "error: torch sees no GPU here; run this on a machine with one" >&2; exit 2; }

failed=0
part() {  # name, time limit in seconds, command ...
    local name=$1 limit=$2 start status
    shift 2
    echo "== $name"
    start=$(date +%s)
    timeout "$limit" "$@" >"$work/$name.log" 2>&1
    status=$?
    tail -n 25 "$work/$name.log"
    printf '%s\t%d\t%d\n' "$name" "$status" $(($(date +%s) - start)) >>"$work/parts.tsv"
    [ $status -eq 0 ] || { echo "FAILED: $name (status $status)"; failed=1; }
}
part tests 240 "$PYTHON" -m pytest -q -m gpu tests
part train_attention 120 "$PYTHON" benchmarks/train_attention.py --device cuda --seconds 1 --check --json "$work/train_attention.json"
part train_step 90 "$PYTHON" benchmarks/train_step.py --device cuda --seconds 15 --check --json "$work/train_step.json"
part train_step_1b 120 "$PYTHON" benchmarks/train_step.py --device cuda --layers 8 --hidden 2048 --groups 8 --seq-length 4096 \
    --batch 2 --seconds 20 --check --json "$work/train_step_1b.json"

mkdir -p "$(dirname "$output")"
"$PYTHON" - "$work" "$output" <<'EOF'
import json, pathlib, sys
work, output = pathlib.Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, "benchmarks")
from _common import machine
parts = {}
for line in (work / "parts.tsv").read_text().splitlines():
    name, status, seconds = line.split("\t")
    part = {"status": int(status), "seconds": int(seconds), "tail": (work / f"{name}.log").read_text()[-2000:]}
    if (work / f"{name}.json").is_file():
        part["figures"] = json.loads((work / f"{name}.json").read_text())["figures"]
    parts[name] = part
pathlib.Path(output).write_text(json.dumps({"machine": machine(), "parts": parts}, indent=2) + "\n")
print(f"written: {output}")
EOF
[ $failed -eq 0 ] && echo "gpu check passed" || echo "gpu check FAILED"
exit $failed
