#!/usr/bin/env bash
# Dynamic Memory Compression from nothing to generated text, on two CPU cores, in at most 15 minutes.
#
# Read it from top to bottom: every step is the command that retrofits a 70B model on a cluster, with other numbers.
#   make retrofit                    # or, in an environment with megatron-dmc: examples/dmc/retrofit.sh [DIR]
# Run it again after an interruption: finished steps are skipped, and a stage resumes from its --save directory.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${1:-build/retrofit}
# megatron-core warns about missing GPU packages, which are not needed here.
export PYTHONWARNINGS=ignore
train() {
    # On a cluster: torchrun --nnodes ... --nproc-per-node 8 --no-python dmc train ... --tensor-model-parallel-size 8
    dmc train --config examples/dmc/configs/retrofit.yaml \
        --data-path "$OUT/data/train" --valid-data-path "$OUT/data/valid" --tokenizer "$OUT/data/tokenizer.model" "$@"
}
DECAY=(--lr-decay-style cosine --min-lr 5e-5)
step() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

step "1. Text (the Python standard library's sources), a tokenizer, and Megatron indexed datasets"
if [ ! -e "$OUT/data/valid.json" ]; then
    python examples/dmc/build_corpus.py --output "$OUT/data" --vocab-size 2048
    for split in train valid; do
        dmc data preprocess --input "$OUT/data/$split.jsonl" --tokenizer "$OUT/data/tokenizer.model" \
            --output-prefix "$OUT/data/$split" --overwrite
    done
fi

step "2. Pre-train a small Llama (with a model of your own: dmc convert import)"
train --stage pretrain --train-iters 300 --lr 2e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters 20 \
    --micro-batch-size 8 --global-batch-size 8 --eval-iters 5 --log-interval 20 --save "$OUT/original"

# From here on two trainings run side by side, each on half of the cores: small steps gain little from a second thread.
HALF=$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))
export OMP_NUM_THREADS=$((HALF < 4 ? HALF : 4))

control() {
    # The original model trained on for as many tokens, at the same learning rates, without DMC. Further training improves a
    # model, so that the loss through compression shows only beside this control.
    train --stage pretrain --train-iters 440 --seed 2 --init-from "$OUT/original" --save "$OUT/control-2x-constant"
    train --stage pretrain --train-iters 120 --seed 4 "${DECAY[@]}" --init-from "$OUT/control-2x-constant" --save "$OUT/control-2x"
    train --stage pretrain --train-iters 420 --seed 3 --init-from "$OUT/control-2x-constant" --save "$OUT/control-4x-constant"
    train --stage pretrain --train-iters 240 --seed 4 "${DECAY[@]}" --init-from "$OUT/control-4x-constant" --save "$OUT/control-4x"
}
step "3. Start the control in the background (its log: $OUT/control.log)"
set -m # a process group of its own, so that all of it ends with this script
control >"$OUT/control.log" 2>&1 &
CONTROL=$!
set +m
trap 'kill -- -$CONTROL 2>/dev/null || true' EXIT

step "3a. zero_out: take the decision neuron, the last channel of every query and key head, out of attention"
train --stage zero_out --train-iters 40 --seed 1 --init-from "$OUT/original" --save "$OUT/zero_out" \
    --tensorboard-dir "$OUT/tensorboard/1-zero_out"

step "3b. retrofit: the target compression ratio rises linearly to 2x; finetune at 2x"
train --stage retrofit --target-cr 2 --train-iters 400 --seed 2 --init-from "$OUT/zero_out" --save "$OUT/retrofit-2x" \
    --tensorboard-dir "$OUT/tensorboard/2-retrofit-2x"
train --stage finetune --train-iters 120 --seed 4 --loss-weight 0.5 "${DECAY[@]}" --init-from "$OUT/retrofit-2x" --save "$OUT/dmc-2x"

step "3c. retrofit: from 2x on to 4x; finetune at 4x"
train --stage retrofit --target-cr 4 --train-iters 420 --seed 3 --loss-weight 1.5 --init-from "$OUT/retrofit-2x" \
    --save "$OUT/retrofit-4x" --tensorboard-dir "$OUT/tensorboard/3-retrofit-4x"
train --stage finetune --train-iters 240 --seed 4 --loss-weight 0.5 "${DECAY[@]}" --init-from "$OUT/retrofit-4x" --save "$OUT/dmc-4x" \
    --tensorboard-dir "$OUT/tensorboard/4-finetune"

step "3d. Wait for the control"
wait "$CONTROL" || { tail "$OUT/control.log" >&2; exit 1; }
trap - EXIT
unset OMP_NUM_THREADS

step "4. A table and two plots: validation with hard decisions, as inference takes them"
# Read a DMC row beside its control: a ratio of 1.05 is a perplexity 5% worse, even where it is lower than the original's.
dmc eval report --tokenizer "$OUT/data/tokenizer.model" --data "$OUT/data/valid" \
    --row "original=$OUT/original" \
    --row "control, tokens of 2x=$OUT/control-2x" \
    --row "control, tokens of 4x=$OUT/control-4x" \
    --row "DMC 2x=$OUT/dmc-2x:control, tokens of 2x" \
    --row "DMC 4x=$OUT/dmc-4x:control, tokens of 4x" \
    --curves "$OUT"/tensorboard/* --output "$OUT/report"

step "5. Export a Hugging Face directory: for the engine, transformers (trust_remote_code=True) and lm-eval"
dmc convert export --load "$OUT/dmc-4x" --save "$OUT/hf" --overwrite
dmc convert inspect "$OUT/hf"

step "6. Generate text with the compressed cache"
dmc generate "$OUT/hf" --prompt $'class Server:\n    """A simple server.\n\n    The server' \
    --max-tokens 160 --temperature 0.7 --top-p 0.9 --seed 1 --stats

step "done: $OUT/report holds report.md, cr_by_head.png and curves.png"
