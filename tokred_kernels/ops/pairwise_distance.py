"""pairwise_distance: all Euclidean distances of an image. Kernels: pairwise_distance in csrc/cpu and triton."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold
from .attention import _wide


def pairwise_distance(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """The Euclidean distance of every two tokens of an image, times scale.

        d_ij = scale sqrt(sum_c (x_ic - x_jc)^2)

    Args:
        x: [B, N, C], floating, any strides. Give it the tokens to cluster: the caller cuts the prefix off.
        scale: a factor on all distances.

    Returns:
        [B, N, N] float32 (float64 if x is). From differences, never from |x|^2 + |y|^2 - 2 x y, which cancels; added in
        a fixed order. Bitwise symmetric, equal tokens have equal rows, and the diagonal is exactly 0 whatever x holds.
        No gradient: the choice of clusters has none.

    Raises:
        RuntimeError: wrong rank, dtype or layout.
    """
    return torch.ops.tokred.pairwise_distance(x, scale=scale)


@torch.library.register_fake("tokred::pairwise_distance")
def _fake(x, *, scale=1.0):
    _check.pairwise_distance(x)
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1], dtype=_wide(x.dtype))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.mark_non_differentiable(output)


def _backward(ctx, _grad):
    return None


torch.library.register_autograd("tokred::pairwise_distance", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::pairwise_distance")
def _vmap(info, in_dims, x, *, scale=1.0):
    fold = BatchFold(info, in_dims)
    return fold.back(pairwise_distance(fold(x, 0), scale=scale)), 0
