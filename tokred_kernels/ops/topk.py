"""topk: keep the patches with the best scores. Kernels: topk in csrc/cpu, csrc/cuda and triton."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold


def topk(score: Tensor, k: int, prefix: int = 1, fuse: bool = False) -> Tensor:
    """Keeps the k patches with the best scores, in their original order.

    Args:
        score: [B, N], floating, read as float32 (float64 if it is); those of the prefix are ignored.
        k: patches to keep, at least 0. k >= P = N - prefix is the identity.
        prefix: leading tokens that are kept, in [0, N].
        fuse: the others share one row behind the kept ones instead of being dropped.

    Returns:
        assign [B, N] int32, the output row of each token, -1 if dropped; rows: the prefix, the kept patches ascending,
        the row of the others if fused. M = min(N, prefix + k + fuse) rows.

    Order: a higher score first, then the lower index; -0 ties with +0, NaN counts as -inf. No gradient.
    Source: Liang et al., "EViT", ICLR 2022, section 3; Haurum et al., "Which Tokens to Use?", ICCVW 2023 (Top-K).

    Raises:
        RuntimeError: wrong rank, dtype or layout, k < 0, prefix outside [0, N].
    """
    return torch.ops.tokred.topk(score, k, prefix, fuse)


def rows(N, k, prefix, fuse: bool):
    """M, for ints and SymInts."""
    return torch.sym_min(N, prefix + k + int(fuse))


@torch.library.register_fake("tokred::topk")
def _fake(score, k, prefix=1, fuse=False):
    _check.topk("topk", score, k, prefix)
    return score.new_empty(score.shape, dtype=torch.int32)


@torch.library.register_vmap("tokred::topk")
def _vmap(info, in_dims, score, k, prefix=1, fuse=False):
    fold = BatchFold(info, in_dims)
    return fold.back(topk(fold(score, 0), k, prefix, fuse)), 0
