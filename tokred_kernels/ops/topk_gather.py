"""topk_gather: topk + gather in one pass. Kernels: topk_gather in csrc/cpu, csrc/cuda and triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold
from .topk import rows
from .unmerge import unmerge


def topk_gather(x: Tensor, score: Tensor, k: int, prefix: int = 1, *, fuse: str = "none") -> tuple[Tensor, Tensor]:
    """Keeps the prefix and the k patches with the best scores; the others may become one more token.

        none: dropped
        sum:  sum_i score_i x_i over the others, not normalised (EViT as published)
        mean: sum_i score_i x_i / sum_i score_i; the plain mean if that sum is 0

    Args:
        x: [B, N, C], floating.
        score: [B, N], any floating dtype, read as float32 (float64 if x is).
        k, prefix: as in `topk`.
        fuse: "none", "sum" or "mean".

    Returns:
        out [B, M, C] in the dtype of x, M = min(N, prefix + k + (fuse != "none")); assign [B, N] int32 as in `topk`.

    Kept tokens are exact copies, and so is a single token in a mean. The others are added in index order in float32;
    a NaN score is the worst for the selection, and makes the fused token NaN.

    Gradients: x, and score through the fused token; first order.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, k < 0, prefix outside [0, N], unknown fuse.
    """
    return torch.ops.tokred.topk_gather(x, score, k, prefix, fuse=fuse)


@torch.library.register_fake("tokred::topk_gather")
def _fake(x, score, k, prefix=1, *, fuse="none"):
    _check.topk_gather(x, score, k, prefix, fuse)
    B, N, C = x.shape
    return x.new_empty(B, rows(N, k, prefix, fuse != "none"), C), x.new_empty(B, N, dtype=torch.int32)


def fused_row(x: Tensor, k: int, prefix: int, fuse: str) -> int:
    """The row of the others in out, -1 if there is none."""
    return -1 if fuse == "none" or k >= x.shape[1] - prefix else prefix + k


def gather_grads(
    grad: Tensor, assign: Tensor, score: Tensor | None, x: Tensor | None, out: Tensor | None, fuse: str, fused_row: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [B, N, C] and score [B, N] from that of out; score, x and out matter where a row is fused."""
    back = unmerge(grad, assign)
    if fused_row < 0:
        return back, None
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    others = assign == fused_row
    w = torch.where(others, score.to(wide), 0)
    if fuse == "sum":
        apart = x
    else:
        total, count = w.sum(1, keepdim=True), others.sum(1, keepdim=True)
        plain = (total == 0) | (count == 1)  # the plain mean and the exact copy do not depend on the scores
        w = torch.where(others, torch.where(plain, 1 / count, w / total), 0)
        apart = x - out[:, fused_row : fused_row + 1]
    grad_score = torch.where(others, (back * apart).sum(-1, dtype=wide), 0)
    if fuse == "mean":
        grad_score = torch.where(plain, 0, grad_score / total)
    grad_x = torch.where(others[..., None], back * w[..., None], back).to(grad.dtype)
    return grad_x, grad_score.to(score.dtype)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, score, k, prefix = inputs
    out, assign = output
    ctx.fuse = keyword_only_inputs["fuse"]
    ctx.mark_non_differentiable(assign)
    ctx.set_materialize_grads(False)
    ctx.fused_row = fused_row(x, k, prefix, ctx.fuse)
    ctx.save_for_backward(assign, *((score, x, out) if ctx.fused_row >= 0 else (None, None, None)))


@once_differentiable
def _backward(ctx, grad, _grad_assign):
    if grad is None:
        return None, None, None, None
    return *gather_grads(grad, *ctx.saved_tensors, ctx.fuse, ctx.fused_row), None, None


torch.library.register_autograd("tokred::topk_gather", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::topk_gather")
def _vmap(info, in_dims, x, score, k, prefix=1, *, fuse="none"):
    fold = BatchFold(info, in_dims)
    results = topk_gather(fold(x, 0), fold(score, 1), k, prefix, fuse=fuse)
    return tuple(fold.back(t) for t in results), (0, 0)
