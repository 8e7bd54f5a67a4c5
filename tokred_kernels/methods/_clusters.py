"""What methods that put patches into clusters share."""

import torch
from torch import Tensor


def to_assign(label: Tensor, prefix: int) -> Tensor:
    """assign [B, N] int32 from the cluster [B, P] of each patch: rows are the prefix, then the clusters."""
    front = torch.arange(prefix, dtype=torch.int32, device=label.device).expand(label.shape[0], -1)
    return torch.cat([front, label.int() + prefix], 1)
