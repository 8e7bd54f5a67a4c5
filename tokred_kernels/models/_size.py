"""What token sizes mean outside the ops: a bias on attention logits, a weight in a mean."""

import torch
from torch import Tensor


def key_mask(size: Tensor, dtype) -> Tensor:
    """log size as a mask [B, 1, 1, N] that attention broadcasts over heads and queries."""
    if size.requires_grad:  # a masked key takes no gradient, where log has an infinite slope
        size = torch.where(size > 0, size, 0)
    return size.log().to(dtype).view(size.shape[0], 1, 1, size.shape[1])


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """The mean over tokens of x [B, N, C], each counted size [B, N] times, in at least float32."""
    size = size.to(torch.promote_types(size.dtype, x.dtype))
    weight = size / size.sum(1, keepdim=True).clamp(min=1)  # 0 where every token is masked
    return (x * weight[..., None]).sum(1).to(x.dtype)
