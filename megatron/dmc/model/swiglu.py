"""SwiGLU that keeps its input alone until the backward pass.

megatron-core's own, where torch.compile does not fuse it, keeps as much again: the gate's activation, and a copy of the
other half (``x_linear + glu_linear_offset``). With a frozen model that is a third of what a layer keeps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate and up side by side: [..., 2 f] -> [..., f]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        torch.mul(F.silu(gate), grad, out=dup)
        return dx
