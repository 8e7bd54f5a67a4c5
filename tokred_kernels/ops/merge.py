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


def mean_grad(grad: Tensor, assign: Tensor, w: Tensor | None, total: Tensor) -> Tensor:
    """d mean / d x: grad [B, m, C] gathered to [B, N, C], times w_i / sum w; total [B, m] is sum w."""
    back = unmerge(grad, assign)
    if w is None:  # total is the number of members
        return (back * unmerge(total.reciprocal()[..., None], assign)).to(grad.dtype)
    count = merge(grad.new_empty(*assign.shape, 0), assign, grad.shape[1])[1]
    plain = (total == 0) | (count == 1)  # the plain mean and the exact copy do not depend on w
    share = unmerge(torch.where(plain, count, total).reciprocal()[..., None], assign)
    w = torch.where(unmerge(plain.to(total.dtype)[..., None], assign) > 0, 1, w.to(total.dtype)[..., None])
    return (back * (w * share)).to(grad.dtype)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, assign, ctx.m, size, weight = inputs
    ctx.reduce = keyword_only_inputs["reduce"]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # size alone gives the gradient of x in a mean; the features are kept for weight and amax only.
    keep = ctx.reduce == "amax" or weight is not None
    ctx.save_for_backward(assign, size, weight, output[1], x if keep else None, output[0] if keep else None)


@once_differentiable
def _backward(ctx, grad, _grad_size):
    if grad is None:
        return None, None, None, None, None
    assign, size, weight, size_out, x, out = ctx.saved_tensors
    if ctx.reduce == "amax":
        largest = (x == unmerge(out, assign)).to(size_out.dtype)
        ties = merge(largest, assign, ctx.m, reduce="sum")[0].clamp(min=1)
        return (unmerge(grad / ties, assign) * largest).to(grad.dtype), None, None, None, None
    if weight is None:
        grad_x = unmerge(grad, assign) if ctx.reduce == "sum" else mean_grad(grad, assign, size, size_out)
        return grad_x, None, None, None, None
    w = weight.to(size_out.dtype)[..., None]
    back = unmerge(grad, assign)
    if ctx.reduce == "sum":
        return back * w.to(grad.dtype), None, None, None, (back * x).sum(-1, dtype=w.dtype).to(weight.dtype)
    total = merge(w, assign, ctx.m, reduce="sum")[0].squeeze(-1)
    apart = ((x - unmerge(out, assign)).to(w.dtype) * back).sum(-1, keepdim=True)
    share = unmerge(torch.where(total == 0, 0, total.reciprocal())[..., None], assign)
    return mean_grad(grad, assign, weight, total), None, None, None, (apart * share).squeeze(-1).to(weight.dtype)


torch.library.register_autograd("tokred::merge", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::merge")
def _vmap(info, in_dims, x, assign, m, size=None, weight=None, *, reduce="mean"):
    fold = BatchFold(info, in_dims)
    out, size_out = merge(fold(x, 0), fold(assign, 1), m, fold(size, 3), fold(weight, 4), reduce=reduce)
    return (fold.back(out), fold.back(size_out)), (0, 0)
