#!/usr/bin/env bash
# Dynamic Memory Compression from nothing to text, on two CPU cores, in at most 15 minutes.
#
# Read it from top to bottom: every step is the command that retrofits a 70B model on a cluster, with other numbers.
#   make quickstart                    # or, in an environment with megatron-dmc: examples/dmc/quickstart.sh [DIR]
# Finished steps are skipped when it is run again: each stage resumes from what its --save directory holds.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${1:-build/quickstart}
# Loading megatron-core costs a few seconds per command; its warnings about missing GPU packages are of no use here.
export PYTHONWARNINGS=ignore
retrofit() {
    # On a cluster: torchrun --nnodes ... --nproc-per-node 8 -m megatron.dmc.training.retrofit ... --tensor-model-parallel-size 8
    python -m megatron.dmc.training.retrofit --config examples/dmc/configs/quickstart.yaml \
        --data-path "$OUT/data/train" --valid-data-path "$OUT/data/valid" --tokenizer "$OUT/data/tokenizer.model" "$@"
}
DECAY=(--lr-decay-style cosine --min-lr 5e-5)
step() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

step "1. Text: the Python standard library's own sources; a tokenizer; Megatron indexed datasets"
if [ ! -e "$OUT/data/valid.json" ]; then
    python examples/dmc/build_corpus.py --output "$OUT/data" --vocab-size 2048
    for split in train valid; do
        python tools/preprocess_data.py --input "$OUT/data/$split.jsonl" --tokenizer "$OUT/data/tokenizer.model" \
            --output-prefix "$OUT/data/$split" --overwrite
    done
fi

step "2. A small Llama, pre-trained (on a cluster: a checkpoint that tools/convert_checkpoint.py imported)"
retrofit --stage pretrain --train-iters 300 --lr 2e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters 20 \
    --micro-batch-size 8 --global-batch-size 8 --eval-iters 5 --log-interval 20 --save "$OUT/original"

# From here on two runs go side by side, each on half of the cores: small steps gain little from a second thread.
HALF=$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))
export OMP_NUM_THREADS=$((HALF < 4 ? HALF : 4))

control() {
    # The original model on as many tokens, with the same learning rates, without DMC.
    retrofit --stage pretrain --train-iters 440 --seed 2 --init-from "$OUT/original" --save "$OUT/control-2x-constant"
    retrofit --stage pretrain --train-iters 120 --seed 4 "${DECAY[@]}" --init-from "$OUT/control-2x-constant" --save "$OUT/control-2x"
    retrofit --stage pretrain --train-iters 420 --seed 3 --init-from "$OUT/control-2x-constant" --save "$OUT/control-4x-constant"
    retrofit --stage pretrain --train-iters 240 --seed 4 "${DECAY[@]}" --init-from "$OUT/control-4x-constant" --save "$OUT/control-4x"
}
step "3. The control starts in the background (its log: $OUT/control.log)"
set -m # a process group of its own, so that all of it ends with this script
control >"$OUT/control.log" 2>&1 &
CONTROL=$!
set +m
trap 'kill -- -$CONTROL 2>/dev/null || true' EXIT

step "3a. zero_out: take the decision neuron, the last channel of q and k, out of attention"
retrofit --stage zero_out --train-iters 40 --seed 1 --init-from "$OUT/original" --save "$OUT/zero_out" \
    --tensorboard-dir "$OUT/tensorboard/1-zero_out"

step "3b. retrofit to 2x: the target compression ratio rises linearly; finetune there"
retrofit --stage retrofit --target-cr 2 --train-iters 400 --seed 2 --init-from "$OUT/zero_out" --save "$OUT/retrofit-2x" \
    --tensorboard-dir "$OUT/tensorboard/2-retrofit-2x"
retrofit --stage finetune --train-iters 120 --seed 4 --loss-weight 0.5 "${DECAY[@]}" --init-from "$OUT/retrofit-2x" --save "$OUT/dmc-2x"

step "3c. retrofit on from 2x to 4x; finetune there"
retrofit --stage retrofit --target-cr 4 --train-iters 420 --seed 3 --loss-weight 1.5 --init-from "$OUT/retrofit-2x" \
    --save "$OUT/retrofit-4x" --tensorboard-dir "$OUT/tensorboard/3-retrofit-4x"
retrofit --stage finetune --train-iters 240 --seed 4 --loss-weight 0.5 "${DECAY[@]}" --init-from "$OUT/retrofit-4x" --save "$OUT/dmc-4x" \
    --tensorboard-dir "$OUT/tensorboard/4-finetune"

step "3d. Wait for the control"
wait "$CONTROL" || { tail "$OUT/control.log" >&2; exit 1; }
trap - EXIT
unset OMP_NUM_THREADS

step "4, 5. The table and the pictures: validation with hard decisions, as inference takes them"
python -m megatron.dmc.evaluation.report --tokenizer "$OUT/data/tokenizer.model" --data "$OUT/data/valid" \
    --row "original=$OUT/original" \
    --row "control, tokens of 2x=$OUT/control-2x" \
    --row "control, tokens of 4x=$OUT/control-4x" \
    --row "DMC 2x=$OUT/dmc-2x:control, tokens of 2x" \
    --row "DMC 4x=$OUT/dmc-4x:control, tokens of 4x" \
    --curves "$OUT"/tensorboard/* --output "$OUT/report"

step "6. A Hugging Face directory: for the engine, transformers (trust_remote_code=True) and lm-eval"
python tools/convert_checkpoint.py export --load "$OUT/dmc-4x" --save "$OUT/hf" --overwrite
python tools/convert_checkpoint.py inspect "$OUT/hf"

step "7. Text from the compressed cache"
dmc generate "$OUT/hf" --prompt $'class Server:\n    """A simple server.\n\n    The server' \
    --max-tokens 160 --temperature 0.7 --top-p 0.9 --seed 1 --stats

step "done: $OUT/report holds report.md, cr_by_head.png and curves.png"
