"""match: bipartite soft matching. Kernels: csrc/cpu/merge.cpp, csrc/cuda/merge.cpp, triton/match.py."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold


def match(
    metric: Tensor,
    r: int,
    prefix: int = 1,
    weight: Tensor | None = None,
    *,
    power: float = 1.0,
    two_way: bool = False,
) -> Tensor:
    """Assigns each of the r patches with the best edges to its most similar partner; two_way in both directions.

    The patches (the tokens after the prefix) at even positions are set a, those at odd positions set b. The edge of
    a_i is its best partner in b:

        score_ij = cos(k_i, k_j)                                                without weight
        score_ij = (max((cos(k_i, k_j) + 1) / 2, 0)^power * weight_i) * weight_j   with weight

    One way, the r patches of a with the best edges merge into their partners; any number may share one.

    Two ways, the r // 2 patches of a with the best edges merge first. Then every b takes its best partner among the a
    that stayed, by the same scores, and the r - r // 2 patches of b with the best of these edges merge. What merged
    into a b that merges follows it. r // 2 is at most half of a, so that an a always stays, and as any number of b
    may share it, exactly r patches merge whatever r is.

    Sources: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3; two ways: Lee et al.,
    "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", CVPR 2024.
    The order of rows and of ties is made explicit.

    Args:
        metric: [B, N, D], or keys [B, H, N, D], whose float32 head mean (in head order) is matched; floating.
        r: patches to remove, clamped to [0, P // 2] with P = N - prefix. r = 0 is the identity.
        prefix: leading tokens that neither merge nor are merged into, in [0, N].
        weight: [B, N], any floating dtype, read as float32.
        power: exponent of the similarity; used with weight only.
        two_way: half of the patches leave a, the other half b.

    Returns:
        assign [B, N] int32, the output row of every token, M = N - r rows: the prefix, the kept a ascending, then b:
        all of them ascending or, two ways, the kept ones in the order of their edges.

    Order: a higher score first, then the lower index; -0 ties with +0; NaN counts as -inf and stays eligible, so
    exactly r patches merge whatever the values are. |score - exact| <= 1e-6, and equal rows have bitwise-equal scores.
    Norms are max(||k||, 1e-6). No gradient.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, prefix outside [0, N].
    """
    return torch.ops.tokred.match(metric, r, prefix, weight, power=power, two_way=two_way)


@torch.library.register_fake("tokred::match")
def _fake(metric, r, prefix=1, weight=None, *, power=1.0, two_way=False):
    _check.match(metric, r, prefix, weight)
    return metric.new_empty(metric.shape[0], metric.shape[-2], dtype=torch.int32)


@torch.library.register_vmap("tokred::match")
def _vmap(info, in_dims, metric, r, prefix=1, weight=None, *, power=1.0, two_way=False):
    fold = BatchFold(info, in_dims)
    metric, weight = fold(metric, 0), fold(weight, 3)
    return fold.back(match(metric, r, prefix, weight, power=power, two_way=two_way)), 0
