"""Other ways to choose who merges into whom than `match`: fixed sets of destinations, every other patch a source.

assign = partition.kth(metric, 3)                       # P - P // 3 patches merge
assign = partition.random(metric, 50, generator=g)      # 50 patches merge
x, size = tokred.merge(x, assign, x.shape[1] - 50, size)
"""

import torch
from torch import Tensor

_NORM_FLOOR = 1e-6  # as in match


def kth(metric: Tensor, k: int, prefix: int = 1) -> Tensor:
    """Merges each patch into the most similar of the patches that end a group of k.

    The patches are cut into groups of k in their order. The last of each group is a destination; the others, and the
    P mod k behind the last whole group, are sources, so nothing is dropped. Where there is no whole group, or k = 1,
    nothing merges.
    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, their code; there the patches behind the last
    group are dropped.

    Args:
        metric: [B, N, D], or keys [B, H, N, D], of which the head mean is compared; floating.
        k: at least 1.
        prefix: leading tokens that take no part.

    Returns:
        assign [B, N] int32, the output row of each token; rows: the prefix, the destinations ascending:
        M = prefix + P // k of them (N if nothing merges).

    Similarity is the cosine, with the order rules of `tokred_kernels.match`. No gradient.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"kth: k must be at least 1, got {k}")
    B, P = metric.shape[0], metric.shape[-2] - prefix
    groups = P // k if k <= P else 0
    last = torch.arange(k - 1, groups * k, k, device=metric.device) if groups else torch.arange(P, device=metric.device)
    return _into(metric, last.expand(B, -1), prefix)


def random(metric: Tensor, r: int, prefix: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
    """Merges r patches, drawn at random for each image, into the most similar of the others.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, their code.

    Args:
        metric, prefix: as in `kth`.
        r: patches to remove, clamped to [0, P - 1].
        generator: on the device of metric; None: torch's own.

    Returns:
        assign [B, N] int32, the output row of each token; rows: the prefix, the destinations ascending:
        M = N - r of them.

    Similarity and order as in `kth`. No gradient.
    """
    B, P = metric.shape[0], metric.shape[-2] - prefix
    r = max(0, min(r, P - 1))
    drawn = torch.rand(B, max(P, 0), generator=generator, device=metric.device)
    return _into(metric, drawn.argsort(dim=1, stable=True)[:, r:].sort(1).values, prefix)


def _into(metric: Tensor, destination: Tensor, prefix: int) -> Tensor:
    """assign [B, N] of every patch to the most similar destination; those [B, K], ascending, to themselves."""
    B, K = destination.shape
    wide = metric.to(torch.promote_types(metric.dtype, torch.float32))
    wide = wide.mean(1) if wide.dim() == 4 else wide
    patch = (wide / wide.norm(dim=-1, keepdim=True).clamp(min=_NORM_FLOOR))[:, prefix:]
    rows = patch.gather(1, destination[..., None].expand(-1, -1, patch.shape[2]))
    # In float64, rounded once: equal rows have equal scores, wherever a matrix product puts them.
    score = (patch.double() @ rows.double().mT).to(wide.dtype)
    score = score.masked_fill(score.isnan(), -torch.inf)
    row = score.argmax(2) if K else score.new_zeros(B, 0)  # the first of equal ones
    row = row.long().scatter(1, destination, torch.arange(K, device=metric.device).expand(B, -1))
    first = torch.arange(prefix, device=metric.device).expand(B, -1)
    return torch.cat([first, prefix + row], 1).int()
