"""nearest: assigns every token to its nearest centre. Kernels: nearest in csrc/cpu and triton."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold


def nearest(distance: Tensor, centres: Tensor, *, pin: bool = False) -> Tensor:
    """The nearest of K centres, each the index of a token, for every token.

        label_i = argmin over c of distance[i, centres_c]

    Args:
        distance: [B, N, N], floating, need not be symmetric.
        centres: [B, K] int32. One outside [0, N) is no centre and never the nearest; -1 can pad (TOKRED_DEBUG=1 makes
            other such values an error).
        pin: a token that is a centre gets its own label whatever its distances, the lowest c that names it.

    Returns:
        label [B, N] int32, -1 where there is no centre.

    Order: a smaller distance first, then the lower c; -0 ties with +0, NaN counts as +inf. No gradient.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape.
    """
    return torch.ops.tokred.nearest(distance, centres, pin=pin)


@torch.library.register_fake("tokred::nearest")
def _fake(distance, centres, *, pin=False):
    _check.nearest(distance, centres)
    return distance.new_empty(distance.shape[:2], dtype=torch.int32)


@torch.library.register_vmap("tokred::nearest")
def _vmap(info, in_dims, distance, centres, *, pin=False):
    fold = BatchFold(info, in_dims)
    return fold.back(nearest(fold(distance, 0), fold(centres, 1), pin=pin)), 0
