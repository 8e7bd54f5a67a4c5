"""add_topk_gather_norm: what a block that selects does between its branches. Kernels: add_topk_gather_norm in csrc/cpu,
csrc/cuda and triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold
from ._norm import norm_grads, refuse_mapped_norm
from .topk import rows
from .topk_gather import fused_row, gather_grads


def add_topk_gather_norm(
    x: Tensor,
    branch: Tensor,
    score: Tensor,
    k: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    prefix: int = 1,
    *,
    fuse: str = "none",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a residual branch, selects and normalises in one pass over the tokens.

        out, assign = topk_gather(x + branch, score, k, prefix, fuse=fuse)
        normed = (out - mean(out)) / sqrt(var(out) + eps) * norm_weight + norm_bias   over the C channels

    Args:
        x, branch: [B, N, C], floating, of one dtype.
        score, k, prefix, fuse: as in `topk_gather`.
        norm_weight, norm_bias: [C], any floating dtype, read as float32 (float64 if x is); None is 1 and 0.

    Returns:
        out, normed [B, M, C] in the dtype of x, assign [B, N] int32 as in `topk_gather`.

    x + branch is rounded to the dtype of x, so out and assign have the bits of the two steps; normed is computed in
    float32 from out, as rounded, with the biased variance.

    Gradients: x, branch, norm_weight, norm_bias, and score through the fused token; first order; the norm is computed
    again for them.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, k < 0, prefix outside [0, N], unknown fuse.
    """
    return torch.ops.tokred.add_topk_gather_norm(
        x, branch, score, k, norm_weight, norm_bias, prefix, fuse=fuse, eps=eps
    )


@torch.library.register_fake("tokred::add_topk_gather_norm")
def _fake(x, branch, score, k, norm_weight, norm_bias, prefix=1, *, fuse="none", eps=1e-6):
    _check.add_topk_gather_norm(x, branch, score, k, norm_weight, norm_bias, prefix, fuse)
    B, N, C = x.shape
    M = rows(N, k, prefix, fuse != "none")
    return x.new_empty(B, M, C), x.new_empty(B, N, dtype=torch.int32), x.new_empty(B, M, C)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, branch, score, k, norm_weight, norm_bias, prefix = inputs
    out, assign, _ = output
    ctx.fuse, ctx.eps = keyword_only_inputs["fuse"], keyword_only_inputs["eps"]
    ctx.mark_non_differentiable(assign)
    ctx.set_materialize_grads(False)
    ctx.fused_row = fused_row(x, k, prefix, ctx.fuse)
    of_fused = (x, branch, score) if ctx.fused_row >= 0 else (None, None, None)
    ctx.save_for_backward(assign, out, norm_weight, norm_bias, *of_fused)


@once_differentiable
def _backward(ctx, grad_out, _grad_assign, grad_normed):
    assign, out, norm_weight, norm_bias, x, branch, score = ctx.saved_tensors
    needs = ctx.needs_input_grad
    tokens = any(needs[:3])
    grads = [None, None]
    if grad_normed is not None:
        grad_row, *grads = norm_grads(grad_normed, out, norm_weight, norm_bias, ctx.eps, (tokens, *needs[4:6]))
        grad_out = grad_row if grad_out is None or grad_row is None else grad_out + grad_row
    if grad_out is None or not tokens:
        return None, None, None, None, *grads, None
    y = None if x is None else x + branch
    grad, grad_score = gather_grads(grad_out, assign, score, y, out, ctx.fuse, ctx.fused_row)
    return grad, grad, grad_score, None, *grads, None


torch.library.register_autograd("tokred::add_topk_gather_norm", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::add_topk_gather_norm")
def _vmap(info, in_dims, x, branch, score, k, norm_weight, norm_bias, prefix=1, *, fuse="none", eps=1e-6):
    refuse_mapped_norm("add_topk_gather_norm", in_dims, slice(4, 6))
    fold = BatchFold(info, in_dims)
    results = add_topk_gather_norm(
        fold(x, 0), fold(branch, 1), fold(score, 2), k, norm_weight, norm_bias, prefix, fuse=fuse, eps=eps
    )
    return tuple(map(fold.back, results)), (0, 0, 0)
