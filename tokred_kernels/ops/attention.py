"""attention that emits its scores. Kernels: attention in csrc/cpu, csrc/cuda and triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._vmap import BatchFold


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, scale: float | None = None, scores: str = "none"
) -> tuple[Tensor, Tensor]:
    """Attention in which key j counts size_j times, and the scores that reduce tokens as its by-product.

        p_hij    = size_j exp(s_hij) / sum_j size_j exp(s_hij),   s = scale q k^T
        out      = p v
        "cls":     scores_j = 1/H sum_h p_h0j            what query 0, the class token, attends to
        "mean":    scores_j = 1/(H Nq) sum_h,i p_hij     the column mean of the attention matrix

    which is softmax(s + log size) v. The matrix p never reaches memory.

    Args:
        q: [B, H, Nq, D], floating, D a multiple of 8 up to 128.
        k, v: [B, H, N, D] in the dtype of q. Any strides: views of a fused qkv projection are read in place.
        size: [B, N], any floating dtype, read as float32 (float64 if q is); None: 1. A size of 0, below 0 or NaN masks
            its key: p is exactly 0, and what k and v hold there is never looked at.
        scale: of the logits; None: D^-1/2.
        scores: "none", "cls" or "mean".

    Returns:
        out [B, H, Nq, D] in the dtype of q, stored [B, Nq, H, D], so that out.transpose(1, 2).flatten(2) is a view;
        scores [B, N] float32 (float64 if q is), [B, 0] for "none", 0 everywhere if Nq = 0.

    Logits, exponentials and sums are float32, added in a fixed order: results are bitwise reproducible. Products of
    half-precision inputs may pass p rounded to their dtype. A row without mass (every key masked or its logit -inf) is
    0 in out and scores; one with a NaN or +inf logit is NaN.

    Gradients: q, k, v through out and through the scores, first order, recomputing p. None for size. No dropout.
    Autocast: q, k, v are cast to the autocast dtype, size is not.

    Source: Bolya et al., "Token Merging", ICLR 2023, equation 1 (proportional attention); Liang et al., "EViT", ICLR
    2022, section 3 (attentiveness of the class token).

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, unknown scores.
    """
    return torch.ops.tokred.attention(q, k, v, size, scale=scale, scores=scores)


def _per_query(t: Tensor, N: int) -> Tensor:
    """An empty [B, H, N, D], stored [B, N, H, D]."""
    B, H, _, D = t.shape
    return t.new_empty(B, N, H, D).transpose(1, 2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("tokred::attention")
def _fake(q, k, v, size=None, *, scale=None, scores="none"):
    _check.attention("attention", q, k, v, size, scores)
    emitted = 0 if scores == "none" else k.shape[2]
    return _per_query(q, q.shape[2]), q.new_empty(q.shape[0], emitted, dtype=_wide(q.dtype))


@torch.library.register_fake("tokred::attention_backward")
def _fake_backward(grad_out, grad_scores, q, k, v, out, size=None, *, scale=None, scores="none"):
    _check.attention_backward(grad_out, grad_scores, q, k, v, out, size, scores)
    return _per_query(q, q.shape[2]), _per_query(k, k.shape[2]), _per_query(v, v.shape[2])


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, size = inputs
    ctx.keywords = keyword_only_inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[0], size)


@once_differentiable
def _backward(ctx, grad_out, grad_scores):
    q, k, v, out, size = ctx.saved_tensors
    if grad_out is None and (grad_scores is None or ctx.keywords["scores"] == "none"):
        return None, None, None, None
    grads = torch.ops.tokred.attention_backward(grad_out, grad_scores, q, k, v, out, size, **ctx.keywords)
    return *grads, None


torch.library.register_autograd("tokred::attention", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::attention")
def _vmap(info, in_dims, q, k, v, size=None, *, scale=None, scores="none"):
    fold = BatchFold(info, in_dims)
    out = attention(fold(q, 0), fold(k, 1), fold(v, 2), fold(size, 3), scale=scale, scores=scores)
    return tuple(fold.back(t) for t in out), (0, 0)


@torch.library.register_vmap("tokred::attention_backward")
def _vmap_backward(info, in_dims, *tensors, scale=None, scores="none"):
    fold = BatchFold(info, in_dims)
    folded = [fold(t, position) for position, t in enumerate(tensors)]
    grads = torch.ops.tokred.attention_backward(*folded, scale=scale, scores=scores)
    return tuple(fold.back(t) for t in grads), (0, 0, 0)


def _autocast(device: str, key: torch._C.DispatchKey) -> None:
    """q, k and v in the autocast dtype; torch.library.register_autocast would cast size too."""

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(device))

    def kernel(q, k, v, size=None, *, scale=None, scores="none"):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.tokred.attention(cast(q), cast(k), cast(v), size, scale=scale, scores=scores)

    _library.impl("attention", kernel, f"Autocast{device.upper()}")


_library = torch.library.Library("tokred", "IMPL")
_autocast("cpu", torch._C.DispatchKey.AutocastCPU)
_autocast("cuda", torch._C.DispatchKey.AutocastCUDA)
