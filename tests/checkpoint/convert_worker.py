"""Worker of test_convert.py: logits of checkpoints in one tensor- x pipeline-parallel layout after the other.

    python -m torch.distributed.run --nproc-per-node 4 tests/checkpoint/convert_worker.py DIRECTORY NAME.TPxPP [...]

DIRECTORY/NAME.mg is a checkpoint, DIRECTORY/NAME.tokens.pt int64 [b, s]; writes DIRECTORY/NAME.TPxPP.pt, logits [b, s,
vocab].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers.in_process import leave_groups
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron.dmc.checkpoint.formats.torch_dist import read_run_config
from megatron.dmc.config import ParallelConfig
from megatron.dmc.model import DMCStep
from megatron.dmc.training import checkpointing, initialize
from megatron.dmc.training.model import build_model, unwrap


def logits(checkpoint: Path, tokens: torch.Tensor, tp: int, pp: int) -> torch.Tensor | None:
    run = read_run_config(checkpoint)
    run.parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    run.data.seq_length, run.training.global_batch_size = tokens.size(1), initialize.world_size()
    run.training.transformer_impl = "local"
    initialize.initialize(run)
    model = unwrap(build_model(run)[0])
    checkpointing.load(checkpoint, [model])
    model.eval()
    positions = torch.arange(tokens.size(1)).expand_as(tokens)

    def forward_step(_, chunk):
        output = chunk(tokens, positions, step=DMCStep(compress=False, neuron_scale=1.0))
        # [b, s, vocab / tp] -> [b, s, vocab]
        return output, lambda x, non_loss_data: gather_from_tensor_model_parallel_region(x.detach())

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(())],
        model=[model],
        num_microbatches=1,
        seq_length=tokens.size(1),
        micro_batch_size=tokens.size(0),
        forward_only=True,
        collect_non_loss_data=True,
    )
    is_last = parallel_state.is_pipeline_last_stage()
    chosen = (
        is_last
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )
    leave_groups()
    return found[0].detach()[..., : run.model.vocab_size] if chosen else None


def main() -> None:
    directory, *runs = Path(sys.argv[1]), *sys.argv[2:]
    for run in runs:
        name, _, layout = run.rpartition(".")
        tp, pp = map(int, layout.split("x"))
        found = logits(directory / f"{name}.mg", torch.load(directory / f"{name}.tokens.pt"), tp, pp)
        if found is not None:
            torch.save(found, directory / f"{run}.pt")
    initialize.shutdown()


if __name__ == "__main__":
    main()
