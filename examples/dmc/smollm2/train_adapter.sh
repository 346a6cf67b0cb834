#!/usr/bin/env bash
# How the adapter in adapter-4x/ was made: text, calibration, training. Two CPU cores take about an hour in fp32; with
# bf16 instructions half an hour, by --bf16.
#
#   examples/dmc/smollm2/train_adapter.sh DIR [flags of dmc train]
#
# Run it again after an interruption: finished steps are skipped, and training resumes from its --save directory.
set -euo pipefail
cd "$(dirname "$0")/../../.."

DIR=${1:?usage: train_adapter.sh DIR [flags of dmc train]}
FLAGS=("${@:2}")
HERE=examples/dmc/smollm2
export PYTHONWARNINGS=ignore # megatron-core warns about missing GPU packages, which are not needed here
train() {
    dmc train --config examples/dmc/configs/smollm2-135m-dms.yaml --data-path "$DIR/data/train" \
        --tokenizer "$DIR/SmolLM2-135M-Instruct" --tensorboard-dir "$DIR/tensorboard/$1" "${FLAGS[@]}" --stage "$@"
}

$HERE/get_model.sh "$DIR"
if [ ! -e "$DIR/data/train.json" ]; then
    python $HERE/collect_text.py --output "$DIR/text"
    dmc data preprocess --input "$DIR/text/train.jsonl" --tokenizer "$DIR/SmolLM2-135M-Instruct" \
        --output-prefix "$DIR/data/train" --overwrite
fi

# 49,152 tokens.
train calibrate --target-cr 4 --train-iters 48 --init-from "$DIR/smollm2" --save "$DIR/calibrated"
# 245,760 tokens; adapter-4x/README.md has what was run there. Noisy decisions evict less than the hard ones of inference: 3.5 here is 4.4 there.
train finetune --target-cr 3.5 --train-iters 240 --seed 2 --save-interval 24 --init-from "$DIR/calibrated" --save "$DIR/adapters"
dmc convert export --adapter-only --load "$DIR/adapters" --save "$DIR/adapter-4x" --base-model SmolLM2-135M-Instruct \
    --decision-bias 4.8 --overwrite
