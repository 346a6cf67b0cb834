#!/usr/bin/env bash
# The text that SmolLM2's adapters are trained on, as Megatron's indexed dataset DIR/data/train, and held-out text beside it.
#
#   examples/dmc/smollm2/get_text.sh DIR
#
# Wants the model in DIR (get_model.sh), for its tokenizer. What is there already is not made again.
set -euo pipefail

DIR=${1:?usage: get_text.sh DIR}
if [ ! -e "$DIR/data/train.json" ]; then
    python examples/dmc/smollm2/collect_text.py --output "$DIR/text"
    dmc data preprocess --input "$DIR/text/train.jsonl" --tokenizer "$DIR/SmolLM2-135M-Instruct" \
        --output-prefix "$DIR/data/train" --overwrite
fi
