"""Compression loss: a hinge on the slots that the whole model keeps, per sequence."""

from torch import Tensor


def compression_loss(kept: Tensor, total: int, target_cr: float) -> Tensor:
    """Compute ``max(0, kept - total / CR) / total`` (arXiv 2403.09636, equation of the auxiliary loss; one-sided).

    Args:
        kept: [b], slots kept by all layers and KV heads of the model for each sequence.
        total: slots without compression, n_layers * n_kv_heads * n_tokens.
        target_cr: CR(t).

    Returns:
        [b], in the dtype of ``kept``; its mean over the batch is the loss.
    """
    return (kept - total / target_cr).clamp_min(0.0) / total
