"""The gradients of the residual sum and of the LayerNorm in add_merge_norm and add_topk_gather_norm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_grads(
    grad: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, needed: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of out, weight and bias, those that are needed, from that of normed [B, M, C]; mean and variance are
    computed again."""
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if t is not None and need else t
            for t, need in zip((out, weight, bias), needed, strict=True)
        ]
        row, weight, bias = (None if t is None else t.to(out.dtype) for t in leaves)
        normed = F.layer_norm(row, row.shape[-1:], weight, bias, eps)
        asked = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(normed, asked, grad))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


def needed_grads(ctx) -> tuple[bool, ...]:
    """needs_input_grad of all nine arguments: torch leaves out the last ones where they were not given."""
    return (*ctx.needs_input_grad, *[False] * 9)[:9]


def residual_grads(
    grad: Tensor, branch: Tensor | None, scale: Tensor | None, bias: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of branch, scale and bias, those that are needed, from that of y = x + scale (branch + bias) [B, N, C].

    branch is looked at for the gradient of scale alone.
    """
    of_branch, of_scale, of_bias = needed
    dtype, wide = grad.dtype, torch.promote_types(grad.dtype, torch.float32)
    grad_scale = None
    if of_scale:
        summed = branch.to(wide) if bias is None else branch + bias.to(wide)
        grad_scale = (grad * summed).sum((0, 1)).to(scale.dtype)
    if scale is not None and (of_branch or of_bias):
        grad = grad * scale.to(wide)
    grad_bias = grad.sum((0, 1), dtype=wide).to(bias.dtype) if of_bias else None
    return grad.to(dtype) if of_branch else None, grad_scale, grad_bias


def refuse_mapped_rows(op: str, in_dims: tuple, positions: tuple[int, ...]) -> None:
    if any(in_dims[position] is not None for position in positions if position < len(in_dims)):
        step = op.removeprefix("add_").removesuffix("_norm")
        raise NotImplementedError(
            f"{op}: vmap over norm_weight, norm_bias, branch_scale or branch_bias; map {step} and F.layer_norm instead"
        )
