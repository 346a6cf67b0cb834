#!/usr/bin/env bash
# How the adapters in adapter-4x/, adapter-4x-short/ and adapter-8x/ were made: text, calibration, training. One core with
# bf16 instructions (--bf16) takes three quarters of an hour, of which the calibration is a quarter; in fp32 twice that.
#
#   examples/dmc/smollm2/train_adapter.sh DIR [flags of dmc train]
#   SEED=12 examples/dmc/smollm2/train_adapter.sh DIR --bf16    # other texts, drawn in another order: another adapter
#
# Run it again after an interruption: finished steps are skipped, and training resumes from its --save directory.
set -euo pipefail
cd "$(dirname "$0")/../../.."

DIR=${1:?usage: train_adapter.sh DIR [flags of dmc train]}
FLAGS=("${@:2}")
SEED=${SEED:-2}
HERE=examples/dmc/smollm2
export PYTHONWARNINGS=ignore # megatron-core warns about missing GPU packages, which are not needed here
train() {
    dmc train --config examples/dmc/configs/smollm2-135m-dms.yaml --data-path "$DIR/data/train" \
        --tokenizer "$DIR/SmolLM2-135M-Instruct" --tensorboard-dir "$DIR/tensorboard/$1" "${FLAGS[@]}" --stage "$@"
}

$HERE/get_model.sh "$DIR"
$HERE/get_text.sh "$DIR"

# Sequences of 3,072 tokens: what is copied over two thousand tokens costs nothing in shorter ones.
SEQ=(--seq-length 3072)
train calibrate "${SEQ[@]}" --target-cr 4 --train-iters 40 --seed "$SEED" --init-from "$DIR/smollm2" --save "$DIR/calibrated"
train finetune "${SEQ[@]}" --target-cr 3.5 --train-iters 60 --seed $((SEED + 1)) --save-interval 10 --init-from "$DIR/calibrated" --save "$DIR/adapters"

# The decision bias moves adapters along their curve; 4x and 8x were chosen on held-out
# prose of 3,072 tokens, 4x-short for 4x in a chat of a thousand (adapter-4x/README.md).
export_at() {
    dmc convert export --adapter-only --load "$DIR/adapters" --save "$DIR/$1" --base-model SmolLM2-135M-Instruct --decision-bias "$2" \
        --overwrite
}
export_at adapter-4x 4.2
export_at adapter-4x-short 3.7
export_at adapter-8x 0.2
