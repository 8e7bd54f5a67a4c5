"""match_merge: match + merge in one pass. Kernels: match_merge in csrc/cpu, csrc/cuda and triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold
from .merge import mean_grad


def match_merge(
    x: Tensor, metric: Tensor, r: int, prefix: int = 1, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of token merging: assign = match(metric, r, prefix), out = the size-weighted mean of its rows.

    Args:
        x: [B, N, C], floating.
        metric: [B, N, D] or keys [B, H, N, D], floating, its dtype independent of x; see `match`.
        r: patches to remove, clamped to [0, P // 2] with P = N - prefix.
        prefix: leading tokens left alone, in [0, N].
        size: [B, N], any floating dtype, the number of image patches each token stands for; None: 1.

    Returns:
        out [B, N - r, C] in the dtype of x, size_out [B, N - r] float32 (float64 if x is), assign [B, N] int32.

    Order, precision and sums are those of `match` and `merge`. Gradients: x, first order, none through the matching.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, prefix outside [0, N].
    """
    return torch.ops.tokred.match_merge(x, metric, r, prefix, size)


@torch.library.register_fake("tokred::match_merge")
def _fake(x, metric, r, prefix=1, size=None):
    _check.match_merge(x, metric, r, prefix, size)
    B, N, C = x.shape
    M = N - _check.clamp_r(r, N, prefix)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(B, M, C), x.new_empty(B, M, dtype=wide), x.new_empty(B, N, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    _, size_out, assign = output
    ctx.mark_non_differentiable(size_out, assign)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(assign, inputs[4])


@once_differentiable
def _backward(ctx, grad, _grad_size, _grad_assign):
    if grad is None:
        return None, None, None, None, None
    return mean_grad(grad, *ctx.saved_tensors), None, None, None, None


torch.library.register_autograd("tokred::match_merge", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::match_merge")
def _vmap(info, in_dims, x, metric, r, prefix=1, size=None):
    fold = BatchFold(info, in_dims)
    results = match_merge(fold(x, 0), fold(metric, 1), r, prefix, fold(size, 4))
    return tuple(fold.back(t) for t in results), (0, 0, 0)
