#!/usr/bin/env bash
# Checks everything that needs a GPU, on a machine that can download nothing: builds the CUDA kernels, runs the gpu tests,
# compute-sanitizer over some of them, and the benchmarks. Writes one JSON with results, GPU, versions, commit and hashes of the
# kernels' sources. Commit it: tests/kernels/test_gpu_record.py warns while there is none of the present kernels.
#
#   tools/gpu_check.sh [--wheels DIR] [--output FILE] [--only kernels|serving|training]
#
# --only     one of three parts, each under 10 minutes (what takes longer is cut off). Run one after the other they add to the same
#            JSON while the kernels stay the same. Without --only: as much as 10 minutes allow, in this order.
# --wheels   folder of wheels that the machine lacks (apache-tvm-ffi, pytest, psutil, flashinfer-python ...), installed into a
#            temporary folder. PyTorch with CUDA must be there, and nvcc unless the package holds built kernels. Without
#            megatron-core training is left out; without flashinfer-python (0.6.3 is small, and needs nvidia-ml-py) its comparison.
# --output   default: benchmarks/results/gpu_<name of the GPU>.json. Exits 1 when a part failed or missed a target.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels="" output="" only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --output) output=${2:?--output needs a file}; shift 2 ;;
        --only) only=${2:?--only needs kernels, serving or training}; shift 2 ;;
        -h|--help) sed -n '2,13p' "$0" | cut -c3-; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
case "$only" in ""|kernels|serving|training) ;; *) echo "error: --only $only: kernels, serving or training" >&2; exit 2 ;; esac
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
: >"$work/parts.tsv"

failed=0
began=$(date +%s)
part() {  # name, time limit in seconds, command ...
    local name=$1 limit=$2 start status left
    shift 2
    left=$((585 - $(date +%s) + began))
    [ "$left" -lt "$limit" ] && limit=$left
    echo "== $name"
    start=$(date +%s)
    if [ "$limit" -gt 5 ]; then
        timeout "$limit" "$@" >"$work/$name.log" 2>&1
        status=$?
    else
        echo "no time left" >"$work/$name.log"
        status=124
    fi
    tail -n 25 "$work/$name.log"
    printf '%s\t%d\t%d\n' "$name" "$status" $(($(date +%s) - start)) >>"$work/parts.tsv"
    [ $status -eq 0 ] || { echo "FAILED: $name (status $status)"; failed=1; }
}
skip() {  # name, why
    echo "== $1: left out, $2"
    echo "$2" >"$work/$1.log"
    printf '%s\t-1\t0\n' "$1" >>"$work/parts.tsv"
}

wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }
if wanted kernels; then
    if command -v "${NVCC:-nvcc}" >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
        part build 180 "$PYTHON" -m megatron.dmc.kernels.build --device cuda
        part resources 120 "$PYTHON" -m megatron.dmc.kernels.build --resources
    else
        skip build "there is no nvcc"
    fi
    part backend 120 "$PYTHON" -c 'from megatron.dmc.kernels import active_backend; assert active_backend("cuda") == "cuda"'
    part kernel_tests 180 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/kernels
    # Every op and every kernel, in a part of the cases: the sanitizer is slow.
    few="large_groups or several_blocks or plans or without_a_page or a_copy_shares or page_edges or (mixed and (1-most or 4-none))"
    few="$few or long_heads or lockstep or give_pages_back or (in_chunks and int8) or (codes_stand and bfloat16)"
    few="cuda and not reference and not graph and not stream and ($few or (precision and not float32))"
    if sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null); then
        for tool in memcheck racecheck; do
            # The caching allocator would hide reads behind the end of a tensor.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 150 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
                "$PYTHON" -m pytest -q -x -p no:cacheprovider -m gpu tests/kernels -k "$few"
        done
    else
        skip memcheck "there is no compute-sanitizer"
        skip racecheck "there is no compute-sanitizer"
    fi
    part decode_attention 150 "$PYTHON" benchmarks/decode_attention.py --device cuda --seconds 0.6 --check \
        --json "$work/decode_attention.json"
    part decode_attention_256 90 "$PYTHON" benchmarks/decode_attention.py --device cuda --batch 256 --slots 512 --seconds 0.6 --check \
        --json "$work/decode_attention_256.json"
    if "$PYTHON" -c 'import flashinfer' 2>/dev/null; then
        # It compiles its own kernels first.
        export FLASHINFER_WORKSPACE_BASE="$work"
        part flashinfer 240 "$PYTHON" benchmarks/decode_attention.py --device cuda --flashinfer --slots 512 2048 --seconds 0.6 --check \
            --json "$work/flashinfer.json"
    else
        skip flashinfer "there is no flashinfer-python"
    fi
    part prefill_attention 60 "$PYTHON" benchmarks/prefill_attention.py --device cuda --tokens 8192 --chunk 2048 --seconds 1 \
        --json "$work/prefill_attention.json"
fi
if wanted serving; then
    part backend 180 "$PYTHON" -c 'from megatron.dmc.kernels import active_backend; assert active_backend("cuda") == "cuda"'
    part throughput_7b 420 "$PYTHON" benchmarks/throughput.py --device cuda --shapes llama2-7b --output-lens 1536 --check \
        --json "$work/throughput_7b.json"
    part throughput_13b 200 "$PYTHON" benchmarks/throughput.py --device cuda --shapes llama2-13b --output-lens 1536 \
        --compression-ratios 1 4 --parts throughput --check --json "$work/throughput_13b.json"
fi
if wanted training; then
    if "$PYTHON" -c 'import megatron.core' 2>/dev/null; then
        part tests 200 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests --ignore tests/kernels
        part train_attention 120 "$PYTHON" benchmarks/train_attention.py --device cuda --seconds 1 --check --json "$work/train_attention.json"
        part train_step 90 "$PYTHON" benchmarks/train_step.py --device cuda --seconds 15 --check --json "$work/train_step.json"
        part train_step_1b 120 "$PYTHON" benchmarks/train_step.py --device cuda --layers 8 --hidden 2048 --groups 8 --seq-length 4096 \
            --batch 2 --seconds 20 --check --json "$work/train_step_1b.json"
    else
        skip training "there is no megatron-core"
    fi
fi

"$PYTHON" - "$work" "$output" <<'EOP'
import json, pathlib, re, sys
import torch
work, output = pathlib.Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, "benchmarks")
from _common import machine
from megatron.dmc.kernels.build import kernel_hashes
parts, about = {}, machine()
for line in (work / "parts.tsv").read_text().splitlines():
    name, status, seconds = line.split("\t")
    part = {"status": int(status), "seconds": int(seconds), "commit": about["commit"], "tail": (work / f"{name}.log").read_text()[-2000:]}
    if name == "resources":
        part["tail"] = (work / f"{name}.log").read_text()
    if (work / f"{name}.json").is_file():
        record = json.loads((work / f"{name}.json").read_text())
        part |= {key: record[key] for key in ("missed", "figures")}
    parts[name] = part
name = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("_")
output = pathlib.Path(output or f"benchmarks/results/gpu_{name}.json")
output.parent.mkdir(parents=True, exist_ok=True)
if output.is_file() and (before := json.loads(output.read_text())).get("kernels") == kernel_hashes():
    parts = {**before["parts"], **parts}
output.write_text(json.dumps({"machine": about, "kernels": kernel_hashes(), "parts": parts}, indent=2) + "\n")
print(f"written: {output}")
EOP
[ $failed -eq 0 ] && echo "gpu check passed" || echo "gpu check FAILED"
exit $failed
