"""The gradient of the LayerNorm in add_merge_norm and add_topk_gather_norm."""

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


def refuse_mapped_norm(op: str, in_dims: tuple, positions: slice) -> None:
    if any(d is not None for d in in_dims[positions]):
        step = op.removeprefix("add_").removesuffix("_norm")
        raise NotImplementedError(f"{op}: vmap over norm_weight or norm_bias; map {step} and F.layer_norm instead")
