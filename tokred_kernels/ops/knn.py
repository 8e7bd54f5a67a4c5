"""knn: the nearest neighbours of every token. Kernels: knn in csrc/cpu and triton."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold
from .attention import _wide


def knn(distance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest distances of each row, ascending; a token at distance 0 from itself is its own neighbour.

    Args:
        distance: [B, N, N], floating, need not be symmetric.
        k: neighbours, at least 0, clamped to N.

    Returns:
        values [B, N, min(k, N)] float32 (float64 if distance is), copies of the distances; indices, int32.

    Order: a smaller distance first, then the lower index; -0 ties with +0, NaN counts as +inf. No gradient.

    Raises:
        RuntimeError: wrong rank, dtype, layout or shape, k < 0.
    """
    return torch.ops.tokred.knn(distance, k)


@torch.library.register_fake("tokred::knn")
def _fake(distance, k):
    _check.knn(distance, k)
    B, N, _ = distance.shape
    shape = (B, N, torch.sym_min(k, N))
    return distance.new_empty(shape, dtype=_wide(distance.dtype)), distance.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _backward(ctx, _grad_values, _grad_indices):
    return None, None


torch.library.register_autograd("tokred::knn", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::knn")
def _vmap(info, in_dims, distance, k):
    fold = BatchFold(info, in_dims)
    return tuple(fold.back(t) for t in knn(fold(distance, 0), k)), (0, 0)
