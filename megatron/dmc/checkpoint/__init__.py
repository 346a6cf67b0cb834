"""Checkpoints: Megatron's ``torch_dist`` format and a small manifest beside it."""
