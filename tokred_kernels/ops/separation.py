"""separation: how far the next denser token is. Kernels: separation in csrc/cpu and triton."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold
from .attention import _wide


def separation(distance: Tensor, density: Tensor) -> Tensor:
    """The distance to the nearest denser token; together with the density it finds the peaks of density.

        out_i = min over the denser j of distance_ij
        out_i = the largest finite distance of the image, for the densest token

    Token j is denser than i if density_j > density_i, or if they are equal and j < i; NaN counts as -inf.
    Source: Rodriguez and Laio, "Clustering by fast search and find of density peaks", Science 2014, equation 2.

    Args:
        distance: [B, N, N], floating, need not be symmetric; NaN counts as +inf.
        density: [B, N], any floating dtype, read as float32 (float64 if distance is).

    Returns:
        [B, N] float32 (float64 if distance is); -inf for the densest where no distance is finite. No gradient.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape.
    """
    return torch.ops.tokred.separation(distance, density)


@torch.library.register_fake("tokred::separation")
def _fake(distance, density):
    _check.separation(distance, density)
    return distance.new_empty(distance.shape[:2], dtype=_wide(distance.dtype))


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _backward(ctx, _grad):
    return None, None


torch.library.register_autograd("tokred::separation", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::separation")
def _vmap(info, in_dims, distance, density):
    fold = BatchFold(info, in_dims)
    return fold.back(separation(fold(distance, 0), fold(density, 1))), 0
