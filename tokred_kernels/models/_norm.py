"""The LayerNorm of a patched block: whether it may be part of a kernel, and of a product in training."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn

from ._inference import is_watched


def fuses_norm(norm: nn.Module, x: Tensor, branch: Tensor) -> bool:
    """A plain LayerNorm that nobody watches, in inference.

    In training, torch keeps the mean and variance that a fused norm would compute again. Reentrant checkpointing is
    training too: its first forward runs without gradients, on an x that asks for one, and the second must repeat it.
    """
    if not _is_plain(norm):
        return False
    if torch.is_grad_enabled() or x.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    return norm.normalized_shape == x.shape[-1:] and x.dtype == branch.dtype


def normed_linear(norm: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight norm(x) + bias; where norm is a plain LayerNorm, training keeps x for it and no norm(x)."""
    if not _is_plain(norm) or not torch.is_grad_enabled():
        return F.linear(norm(x), weight, bias)
    return _NormedLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)


def _is_plain(norm: nn.Module) -> bool:
    return type(norm) in (nn.LayerNorm, LayerNorm) and not is_watched(norm)


class _NormedLinear(torch.autograd.Function):
    """Its gradient normalises again: one more pass over x, for one [B, N, C] less in memory until then."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, norm_weight, norm_bias, eps, weight, bias):
        return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *kept, ctx.eps, weight, _bias = inputs
        ctx.save_for_backward(*kept, weight)

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        *of_norm, _eps, of_weight, of_bias = ctx.needs_input_grad
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps)
        # Under autocast grad has the dtype of the product.
        grad_weight = grad.flatten(0, -2).mT @ normed.to(grad.dtype).flatten(0, -2) if of_weight else None
        grad_bias = grad.flatten(0, -2).sum(0) if of_bias else None
        grads = (None, None, None)
        if any(of_norm):
            grads = torch.ops.aten.native_layer_norm_backward(
                (grad @ weight.to(grad.dtype)).to(x.dtype), x, x.shape[-1:], mean, rstd, norm_weight, norm_bias, of_norm
            )
        return *grads, None, grad_weight, grad_bias
