"""add_topk_gather_norm: what a block that selects does between its branches. Kernels: add_topk_gather_norm in csrc/cpu,
csrc/cuda and triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold
from ..reference import residual
from ._norm import needed_grads, norm_grads, refuse_mapped_rows, residual_grads
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
    branch_scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    fuse: str = "none",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a residual branch, selects and normalises in one pass over the tokens.

        y = x + branch_scale * (branch + branch_bias)
        out, assign = topk_gather(y, score, k, prefix, fuse=fuse)
        normed = (out - mean(out)) / sqrt(var(out) + eps) * norm_weight + norm_bias   over the C channels

    Args:
        x, branch: [B, N, C], floating, of one dtype.
        score, k, prefix, fuse: as in `topk_gather`.
        norm_weight, norm_bias, branch_scale, branch_bias: [C], any floating dtype, read as float32 (float64 if x is);
            None is 1 and 0.

    Returns:
        out, normed [B, M, C] in the dtype of x, assign [B, N] int32 as in `topk_gather`.

    y is rounded once to the dtype of x, so without scale and bias out and assign have the bits of the two steps; with
    them its product may be rounded or not before it is added. normed is computed in float32 from out, as rounded, with
    the biased variance.

    Gradients: x, branch, the four [C], and score through the fused token; first order; the norm is computed again for
    them.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, k < 0, prefix outside [0, N], unknown fuse.
    """
    return torch.ops.tokred.add_topk_gather_norm(
        x, branch, score, k, norm_weight, norm_bias, prefix, branch_scale, branch_bias, fuse=fuse, eps=eps
    )


@torch.library.register_fake("tokred::add_topk_gather_norm")
def _fake(
    x, branch, score, k, norm_weight, norm_bias, prefix=1, branch_scale=None, branch_bias=None, *, fuse="none", eps=1e-6
):
    _check.add_topk_gather_norm(x, branch, score, k, norm_weight, norm_bias, prefix, branch_scale, branch_bias, fuse)
    B, N, C = x.shape
    M = rows(N, k, prefix, fuse != "none")
    return x.new_empty(B, M, C), x.new_empty(B, N, dtype=torch.int32), x.new_empty(B, M, C)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, branch, score, k, norm_weight, norm_bias, prefix, scale, bias = inputs
    out, assign, _ = output
    ctx.fuse, ctx.eps = keyword_only_inputs["fuse"], keyword_only_inputs["eps"]
    ctx.mark_non_differentiable(assign)
    ctx.set_materialize_grads(False)
    ctx.fused_row = fused_row(x, k, prefix, ctx.fuse)
    of_fused = (x, score) if ctx.fused_row >= 0 else (None, None)
    scaled = scale is not None and needed_grads(ctx)[7]
    kept = branch if ctx.fused_row >= 0 or scaled else None
    ctx.save_for_backward(assign, out, norm_weight, norm_bias, scale, bias, kept, *of_fused)


@once_differentiable
def _backward(ctx, grad_out, _grad_assign, grad_normed):
    assign, out, norm_weight, norm_bias, scale, bias, branch, x, score = ctx.saved_tensors
    needs = needed_grads(ctx)
    tokens = any((*needs[:3], *needs[7:9]))
    grads = [None, None]
    if grad_normed is not None:
        grad_row, *grads = norm_grads(grad_normed, out, norm_weight, norm_bias, ctx.eps, (tokens, *needs[4:6]))
        grad_out = grad_row if grad_out is None or grad_row is None else grad_out + grad_row
    if grad_out is None or not tokens:
        return None, None, None, None, *grads, None, None, None
    y = None if x is None else residual(x, branch, scale, bias)
    grad, grad_score = gather_grads(grad_out, assign, score, y, out, ctx.fuse, ctx.fused_row)
    grad_branch, *of_rows = residual_grads(grad, branch, scale, bias, (needs[1], *needs[7:9]))
    return grad, grad_branch, grad_score, None, *grads, None, *of_rows


torch.library.register_autograd("tokred::add_topk_gather_norm", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::add_topk_gather_norm")
def _vmap(
    info,
    in_dims,
    x,
    branch,
    score,
    k,
    norm_weight,
    norm_bias,
    prefix=1,
    scale=None,
    bias=None,
    *,
    fuse="none",
    eps=1e-6,
):
    refuse_mapped_rows("add_topk_gather_norm", in_dims, (4, 5, 7, 8))
    fold = BatchFold(info, in_dims)
    folded = fold(x, 0), fold(branch, 1), fold(score, 2)
    results = add_topk_gather_norm(*folded, k, norm_weight, norm_bias, prefix, scale, bias, fuse=fuse, eps=eps)
    return tuple(map(fold.back, results)), (0, 0, 0)
