"""The comparison of compression methods, by one command: ``python -m megatron.dmc.evaluation.compare CONFIG``."""
