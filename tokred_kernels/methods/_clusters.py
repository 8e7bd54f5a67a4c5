"""What methods that put patches into clusters share."""

import torch
from torch import Tensor


def to_assign(label: Tensor, prefix: int) -> Tensor:
    """assign [B, N] int32 from the cluster [B, P] of each patch: rows are the prefix, then the clusters."""
    front = torch.arange(prefix, dtype=torch.int32, device=label.device).expand(label.shape[0], -1)
    return torch.cat([front, label.int() + prefix], 1)


def ranked(score: Tensor, k: int) -> Tensor:
    """[B, k] int32, the k best of score [B, P] by the order rule: the highest first, of equals the lower index."""
    score = score.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k].int()


def farthest_first(distance: Tensor, k: int) -> Tensor:
    """[B, k] int32: of P tokens with distance [B, P, P], the one with the smallest sum of distances, and then, one by
    one, the one farthest from those that are chosen; of equals the lower index."""
    distance = distance.masked_fill(distance.isnan(), torch.inf)
    centre = distance.sum(2).argmin(1, keepdim=True)
    apart = torch.full_like(distance[:, 0], torch.inf)  # from the nearest chosen token, -1: chosen
    chosen = [centre]
    for _ in range(k - 1):
        row = distance.gather(1, centre[:, None].expand(-1, -1, distance.shape[2])).squeeze(1)
        apart = torch.minimum(apart, row).scatter(1, centre, -1.0)
        centre = apart.argmax(1, keepdim=True)
        chosen.append(centre)
    return torch.cat(chosen, 1).int()
