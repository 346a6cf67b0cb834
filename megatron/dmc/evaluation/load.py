"""Load a checkpoint of any layout as one model on this process' device."""

import dataclasses
from pathlib import Path

import torch

from megatron.dmc import schedule
from megatron.dmc.checkpoint.manifest import Manifest, read_manifest, resolve_checkpoint
from megatron.dmc.config import ParallelConfig, RunConfig
from megatron.dmc.model import DMCGPTModel, DMCStep
from megatron.dmc.training import arguments, initialize


@dataclasses.dataclass
class Loaded:
    """A checkpoint that is ready to evaluate."""

    model: DMCGPTModel
    config: RunConfig
    manifest: Manifest
    path: Path

    @property
    def compresses(self) -> bool:
        return schedule.compresses(self.config.stage)

    def step(self) -> DMCStep:
        """Step state of a forward pass as inference runs it: hard decisions, or plain attention before retrofit."""
        scale = 0.0 if self.manifest.stage == "zero_out" and self.manifest.finished else 1.0
        return DMCStep(compress=self.compresses, neuron_scale=scale)


def load_checkpoint(path: str | Path, bf16: bool = False) -> Loaded:
    """Load weights in fp32 (or bf16), in eval mode.

    Raises:
        ValueError: ``path`` holds no complete checkpoint.
    """
    directory = resolve_checkpoint(path)
    manifest = read_manifest(directory)
    config = RunConfig.from_dict(arguments.read_saved_config(directory))
    config.parallel = ParallelConfig()
    config.training = dataclasses.replace(config.training, bf16=bf16, global_batch_size=1, micro_batch_size=1)
    initialize.initialize(config)
    from megatron.dmc.training import checkpointing
    from megatron.dmc.training.model import transformer_config

    model = DMCGPTModel(transformer_config(config), config.model, config.dmc, carry=False, transformer_impl="local")
    model.to(initialize.device(), torch.bfloat16 if bf16 else torch.float32)
    checkpointing.load(directory, [model])
    model.eval()
    return Loaded(model, config, manifest, directory)
