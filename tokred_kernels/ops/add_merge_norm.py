"""add_merge_norm: what a block that merges does between its branches. Kernels: add_merge_norm in csrc/cpu,
csrc/cuda and triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold
from ._norm import needed_grads, norm_grads, refuse_mapped_rows, residual_grads
from .merge import mean_grad


def add_merge_norm(
    x: Tensor,
    branch: Tensor,
    assign: Tensor,
    m: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    size: Tensor | None = None,
    branch_scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a residual branch, merges and normalises in one pass over the tokens.

        y = x + branch_scale * (branch + branch_bias)
        out, size_out = merge(y, assign, m, size)
        normed = (out - mean(out)) / sqrt(var(out) + eps) * norm_weight + norm_bias   over the C channels

    Args:
        x, branch: [B, N, C], floating, of one dtype.
        assign, m, size: as in `merge`.
        norm_weight, norm_bias, branch_scale, branch_bias: [C], any floating dtype, read as float32 (float64 if x is);
            None is 1 and 0.

    Returns:
        out, normed [B, m, C] in the dtype of x, size_out [B, m] float32 (float64 if x is).

    y is rounded once to the dtype of x, so without scale and bias out and size_out have the bits of the two steps; with
    them its product may be rounded or not before it is added. normed is computed in float32 from out, as rounded, with
    the biased variance.

    Gradients: x, branch and the four [C], first order; the norm is computed again for them.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, m < 0.
    """
    return torch.ops.tokred.add_merge_norm(
        x, branch, assign, m, norm_weight, norm_bias, size, branch_scale, branch_bias, eps=eps
    )


@torch.library.register_fake("tokred::add_merge_norm")
def _fake(x, branch, assign, m, norm_weight, norm_bias, size=None, branch_scale=None, branch_bias=None, *, eps=1e-6):
    _check.add_merge_norm(x, branch, assign, m, norm_weight, norm_bias, size, branch_scale, branch_bias)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, _, C = x.shape
    return x.new_empty(B, m, C), x.new_empty(B, m, dtype=wide), x.new_empty(B, m, C)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    _x, branch, assign, _m, norm_weight, norm_bias, size, scale, bias = inputs
    ctx.eps = keyword_only_inputs["eps"]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    scaled = branch if scale is not None and needed_grads(ctx)[7] else None
    ctx.save_for_backward(assign, size, norm_weight, norm_bias, output[0], scaled, scale, bias)


@once_differentiable
def _backward(ctx, grad_out, _grad_size, grad_normed):
    assign, size, norm_weight, norm_bias, out, branch, scale, bias = ctx.saved_tensors
    needs = needed_grads(ctx)
    tokens = any((*needs[:2], *needs[7:9]))
    grads = [None, None]
    if grad_normed is not None:
        grad_row, *grads = norm_grads(grad_normed, out, norm_weight, norm_bias, ctx.eps, (tokens, *needs[4:6]))
        grad_out = grad_row if grad_out is None or grad_row is None else grad_out + grad_row
    if grad_out is None or not tokens:
        return None, None, None, None, *grads, None, None, None
    grad = mean_grad(grad_out, assign, size)
    grad_branch, *of_rows = residual_grads(grad, branch, scale, bias, (needs[1], *needs[7:9]))
    return grad, grad_branch, None, None, *grads, None, *of_rows


torch.library.register_autograd("tokred::add_merge_norm", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::add_merge_norm")
def _vmap(info, in_dims, x, branch, assign, m, norm_weight, norm_bias, size=None, scale=None, bias=None, *, eps=1e-6):
    refuse_mapped_rows("add_merge_norm", in_dims, (4, 5, 7, 8))
    fold = BatchFold(info, in_dims)
    folded = fold(x, 0), fold(branch, 1), fold(assign, 2)
    results = add_merge_norm(*folded, m, norm_weight, norm_bias, fold(size, 6), scale, bias, eps=eps)
    return tuple(map(fold.back, results)), (0, 0, 0)
