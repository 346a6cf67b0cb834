#!/usr/bin/env bash
# DMC on SmolLM2-135M: all weights, distilled from the original model, towards 4x, in 340 steps of 1,024 tokens. A step
# takes 5.5 s on one core with bf16 instructions (--bf16). The stages have not been run to their end yet.
#
#   examples/dmc/smollm2/train_dmc.sh DIR [flags of dmc train]
#
# DIR is that of train_adapter.sh: the model and the text there are used. Run it again after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../../.."

DIR=${1:?usage: train_dmc.sh DIR [flags of dmc train]}
FLAGS=("${@:2}")
HERE=examples/dmc/smollm2
export PYTHONWARNINGS=ignore # megatron-core warns about missing GPU packages, which are not needed here
train() {
    dmc train --config examples/dmc/configs/smollm2-135m-dmc.yaml --data-path "$DIR/data/train" --distill-from "$DIR/smollm2" \
        --tokenizer "$DIR/SmolLM2-135M-Instruct" --tensorboard-dir "$DIR/tensorboard/$2" "${FLAGS[@]}" --save-interval 20 --stage "$@"
}

$HERE/get_model.sh "$DIR"
$HERE/get_text.sh "$DIR"

train zero_out --train-iters 40 --seed 1 --init-from "$DIR/smollm2" --save "$DIR/zero_out"
train retrofit --target-cr 2 --train-iters 120 --seed 2 --init-from "$DIR/zero_out" --save "$DIR/dmc-to-2x"
train retrofit --target-cr 4 --train-iters 120 --seed 3 --init-from "$DIR/dmc-to-2x" --save "$DIR/dmc-to-4x"
train finetune --train-iters 60 --seed 4 --loss-weight 0.5 --lr-decay-style cosine --min-lr 1e-5 --init-from "$DIR/dmc-to-4x" --save "$DIR/dmc-4x"
dmc convert export --load "$DIR/dmc-4x" --save "$DIR/SmolLM2-135M-Instruct-DMC-4x" --overwrite
