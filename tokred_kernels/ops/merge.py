"""merge: apply an assignment. Kernels: csrc/cpu/merge.cpp, csrc/cuda/merge.cpp, triton/merge.py."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold
from .unmerge import unmerge


def merge(
    x: Tensor,
    assign: Tensor,
    m: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Combines the tokens that share an output row.

        mean: out_j = sum_i w_i x_i / sum_i w_i   over assign_i = j, w = weight, else size, else 1
        sum:  out_j = sum_i w_i x_i               w = weight, else 1
        amax: out_j = max_i x_i                   weight ignored; NaN wins, as in torch.amax
        size_out_j = sum_i size_i                 the number of members if size is None

    Source: the size-weighted average of Bolya et al., "Token Merging", ICLR 2023, section 3, for any assignment.

    Args:
        x: [B, N, C], floating.
        assign: [B, N] int32, the output row of each token. Values outside [0, m) drop the token.
        m: number of output rows, at least 0.
        size, weight: [B, N], any floating dtype, read as float32 (float64 if x is).
        reduce: "mean", "sum" or "amax".

    Returns:
        out [B, m, C] in the dtype of x, size_out [B, m] float32 (float64 if x is).

    Members are added in index order in float32, so results are bitwise reproducible. A row with one member is an
    exact copy (mean, amax); a row without is 0 with size 0. sum w = 0: the plain mean.

    Gradients: x and weight, first order. amax divides its gradient equally among equal maxima, as torch.amax does.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, m < 0, unknown reduce.
    """
    return torch.ops.tokred.merge(x, assign, m, size, weight, reduce=reduce)


@torch.library.register_fake("tokred::merge")
def _fake(x, assign, m, size=None, weight=None, *, reduce="mean"):
    _check.merge(x, assign, m, size, weight, reduce)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], m, x.shape[2]), x.new_empty(x.shape[0], m, dtype=wide)


def mean_grad(grad: Tensor, assign: Tensor, w: Tensor | None) -> Tensor:
    """d mean / d x: grad [B, m, C] gathered to [B, N, C], times w_i / sum w.

    (m + 4 N) C elements an image, a gather and a product; one kernel would move (m + N) C.
    """
    m, wide = grad.shape[1], torch.promote_types(grad.dtype, torch.float32)
    if w is None:
        count = merge(grad.new_empty(*assign.shape, 0), assign, m)[1][..., None]
        share = unmerge(count.reciprocal(), assign)
    else:
        w = w.to(wide)[..., None]
        total, count = merge(w, assign, m, reduce="sum")
        count = count[..., None]
        weighs = (total != 0) & (count != 1)  # the plain mean and the exact copy do not depend on w
        share = unmerge(torch.where(weighs, total, count).reciprocal(), assign)
        share = torch.where(unmerge(weighs.to(wide), assign) > 0, w * share, share)
    return (unmerge(grad, assign) * share).to(grad.dtype)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, assign, ctx.m, size, weight = inputs
    ctx.reduce = keyword_only_inputs["reduce"]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # The gradient of x takes sizes and weights alone; that of the weights, and amax, the features too.
    ctx.weighs = weight is not None and ctx.reduce != "amax" and ctx.needs_input_grad[4]
    keep = ctx.weighs or ctx.reduce == "amax"
    ctx.save_for_backward(assign, size, weight, x if keep else None, output[0] if keep else None)


@once_differentiable
def _backward(ctx, grad, _grad_size):
    if grad is None:
        return None, None, None, None, None
    assign, size, weight, x, out = ctx.saved_tensors
    wide = torch.promote_types(grad.dtype, torch.float32)
    if ctx.reduce == "amax":
        largest = (x == unmerge(out, assign)).to(wide)
        ties = merge(largest, assign, ctx.m, reduce="sum")[0].clamp(min=1)
        return (unmerge(grad / ties, assign) * largest).to(grad.dtype), None, None, None, None
    grad_weight = _weight_grad(ctx, grad.to(wide), assign, weight, x, out) if ctx.weighs else None
    if ctx.reduce == "mean":
        grad_x = mean_grad(grad, assign, size if weight is None else weight)
    else:
        grad_x = unmerge(grad, assign)
        if weight is not None:
            grad_x = grad_x * weight.to(grad.dtype)[..., None]
    return grad_x, None, None, None, grad_weight


def _weight_grad(ctx, grad: Tensor, assign: Tensor, weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """<x_i, grad_j> of a sum, <x_i - out_j, grad_j> / sum w of a mean, 0 where that sum is 0; grad [B, m, C] wide."""
    if ctx.reduce == "mean":
        total = merge(weight.to(grad.dtype)[..., None], assign, ctx.m, reduce="sum")[0]
        grad = grad * torch.where(total == 0, 0, total.reciprocal())
        x = x - unmerge(out, assign)
    return (x * unmerge(grad, assign)).sum(-1).to(weight.dtype)


torch.library.register_autograd("tokred::merge", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::merge")
def _vmap(info, in_dims, x, assign, m, size=None, weight=None, *, reduce="mean"):
    fold = BatchFold(info, in_dims)
    out, size_out = merge(fold(x, 0), fold(assign, 1), m, fold(size, 3), fold(weight, 4), reduce=reduce)
    return (fold.back(out), fold.back(size_out)), (0, 0)
