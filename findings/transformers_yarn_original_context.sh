#!/usr/bin/env bash
# transformers 4.50.3 and 4.57.6 compute two different models from one config.json with YaRN.
#
# A good engineer expects `original_max_position_embeddings` beside `factor`, which the YaRN paper's formula needs and
# published configurations give (Qwen 3: 32768 beside a max_position_embeddings of 40960), to be read, or an error.
# 4.50.3 takes max_position_embeddings for it whatever the key says, with "Unrecognized keys" in the log as the only
# sign, and ignores `mscale` and `mscale_all_dim` too; 4.57.6 reads all of them. So the frequencies of the rotation and
# the factor on queries and keys differ, and every logit with them.
#
# Seen (rope_theta 1e6, head of 128 channels, factor 4, mscale 1, mscale_all_dim 0.5):
#     4.50.3: the key changes the frequencies: False   factor on queries and keys: 1.138629
#     4.57.6: the key changes the frequencies: True    factor on queries and keys: 1.064822
# So a reader of such a file has to say which of them it follows. Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/yarn.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

transformers.logging.set_verbosity_error()


def yarn(**more):
    scaling = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, **more}
    sizes = dict(hidden_size=512, num_attention_heads=4, head_dim=128, max_position_embeddings=40960, rope_theta=1e6)
    return ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**sizes, rope_scaling=scaling), "cpu")


with_key, factor = yarn(original_max_position_embeddings=8192)
without, _ = yarn()
reads = not torch.equal(with_key, without)
print(f"{transformers.__version__}: the key changes the frequencies: {reads!s:5}   factor on queries and keys: {factor:.6f}")
expected = {"4.50.3": (False, 1.138629), "4.57.6": (True, 1.064822)}[transformers.__version__]
sys.exit((reads, round(factor, 6)) != expected)
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
for version in 4.50.3 4.57.6; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
    "$folder/venv/bin/python" -W ignore "$folder/yarn.py"
done
echo "holds: one config.json, two models"
