"""Configuration of a run, as dataclasses: what a YAML or JSON file holds and what the command line overrides.

Needs nothing but the standard library, so that a launcher, a scheduler or the serving side can read a configuration
without torch. Every section checks itself (``check``), and :class:`RunConfig` checks what needs two sections to see; a
wrong value raises ``ValueError`` naming the value and the fix, before any memory is taken. The docstring of a field is
the help of its command-line flag.
"""

from megatron.dmc.config.files import build, load_file
from megatron.dmc.config.model import DMCConfig, ModelConfig
from megatron.dmc.config.run import RunConfig
from megatron.dmc.config.stage import COMPRESSING, STAGES, OptimizerConfig, StageConfig, predecessors
from megatron.dmc.config.training import DISTILLED_TOKENS, DataConfig, ParallelConfig, TrainingConfig
