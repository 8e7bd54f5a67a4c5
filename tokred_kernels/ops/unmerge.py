"""unmerge: give every token its row back. Kernels: csrc/cpu/merge.cpp, csrc/cuda/merge.cpp, triton/unmerge.py."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold


def unmerge(y: Tensor, assign: Tensor) -> Tensor:
    """Gives every token the row it was merged into: x_i = y[assign_i], 0 where the token was dropped.

    Args:
        y: [B, M, C], floating.
        assign: [B, N] int32. Values outside [0, M) mean dropped.

    Returns:
        [B, N, C] in the dtype of y, exact copies.

    Gradients: y, first order; the sum over the members of a row, in index order.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape.
    """
    return torch.ops.tokred.unmerge(y, assign)


@torch.library.register_fake("tokred::unmerge")
def _fake(y, assign):
    _check.unmerge(y, assign)
    return y.new_empty(y.shape[0], assign.shape[1], y.shape[2])


def _setup_context(ctx, inputs, output):
    y, assign = inputs
    ctx.m = y.shape[1]
    ctx.save_for_backward(assign)


@once_differentiable
def _backward(ctx, grad):
    (assign,) = ctx.saved_tensors
    return torch.ops.tokred.merge(grad, assign, ctx.m, reduce="sum")[0], None


torch.library.register_autograd("tokred::unmerge", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::unmerge")
def _vmap(info, in_dims, y, assign):
    fold = BatchFold(info, in_dims)
    return fold.back(unmerge(fold(y, 0), fold(assign, 1))), 0
