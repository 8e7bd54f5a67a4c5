"""Whether the LayerNorm of a patched block may be part of a kernel."""

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn


def fuses_norm(norm: nn.Module, x: Tensor, branch: Tensor) -> bool:
    """A plain LayerNorm that nobody watches, in inference.

    In training, torch keeps the mean and variance that a fused norm would compute again. Reentrant checkpointing is
    training too: its first forward runs without gradients, on an x that asks for one, and the second must repeat it.
    """
    if type(norm) not in (nn.LayerNorm, LayerNorm) or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    if torch.is_grad_enabled() or x.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    return norm.normalized_shape == x.shape[-1:] and x.dtype == branch.dtype
