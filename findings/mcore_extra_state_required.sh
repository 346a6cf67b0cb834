#!/usr/bin/env bash
# megatron-core 0.16.1: dist_checkpointing.load refuses a checkpoint that lacks objects which hold nothing but None.
#
# A good engineer who converts weights writes every parameter of a GPTModel and expects its load to be content: the
# local layers have no FP8 state. Every linear layer has an _extra_state all the same, whose value is None, and load asks
# the checkpoint for it by name ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", one for each layer) with its
# default strict, ASSUME_OK_UNEXPECTED. The error names such a key and not that it is empty. An nn.Module's own
# load_state_dict of the same model does not miss them.
#
# Seen (torch 2.13.0): a checkpoint of all parameters and no extra state
#     default strict:      refused
#     strict="log_all":    loaded, every parameter right
# So a converter must write the empty objects too. Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.16.1 numpy==2.2.6 packaging==26.3 psutil==7.2.2
cat > "$folder/load.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed


def make() -> GPTModel:
    config = TransformerConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(config, spec, 128, 64, position_embedding_type="rope", share_embeddings_and_output_weights=False)


def load(model: GPTModel, directory: Path, **strict: str) -> str:
    try:
        found = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory), **strict)
    except BaseException as error:  # torch's CheckpointException is one
        assert "_extra_state" in str(error), error
        return "refused"
    model.load_state_dict((found[0] if isinstance(found, tuple) else found)["model"], strict=False)
    return "loaded"


if __name__ == "__main__":  # saving starts a process
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")
        torch.cuda.synchronize = lambda: None
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    directory, model = Path(sys.argv[1]) / "checkpoint", make()
    directory.mkdir()
    state = model.sharded_state_dict()
    extra = {name for name in state if "_extra_state" in name}
    assert extra and all(state[name].data is None for name in extra), extra
    dist_checkpointing.save({"model": {k: v for k, v in state.items() if k not in extra}}, str(directory))
    other = make()
    results = {"default": load(other, directory), "log_all": load(other, directory, strict="log_all")}
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    print(results, "every parameter right:", same)
    sys.exit(results != {"default": "refused", "log_all": "loaded"} or not same)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/load.py" "$folder"
echo "holds: a checkpoint without empty extra state is refused"
