"""Attention of a patched block: our op or torch's, whichever `_backend.ATTENTION` says is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._backend import ATTENTION
from ._inference import without_autograd
from ._size import key_mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, scores: str = "none", dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T D^-1/2 + log size) v [B, H, N, D], and its scores [B, N] as `tokred_kernels.attention` has them.

    Args:
        q, k, v: [B, H, N, D], D up to 128 for scores.
        size: [B, N], at least 0; 0 masks.
        dropout: of the attention matrix, which torch alone can do.

    Raises:
        ValueError: scores under dropout.
    """
    D, scored = q.shape[-1], scores != "none"
    if scored and dropout > 0:
        raise ValueError(f"attention that emits scores has no dropout: train with attn_drop = 0, got {dropout}")
    scale = None
    if scored and D % 8:
        scale = D**-0.5
        q, k, v = map(_padded, (q, k, v))
    kind = "scored" if scored else "plain" if size is None else "sized"
    ours = ATTENTION.get(q.device.type, {}).get(kind) == "tokred"
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= _check.MAX_WIDTH and dropout == 0
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)  # attention_scores has no gradient
    if (ours or (scored and trains)) and fits:
        with without_autograd():
            out, emitted = torch.ops.tokred.attention(q, k, v, size, scale=scale, scores=scores)
    else:
        mask = None if size is None else key_mask(size, q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        emitted = torch.ops.tokred.attention_scores(q, k, size, scale=scale, scores=scores) if scored else None
    return out if scale is None else out[..., :D], emitted if scored else None


def scores_alone(q: Tensor, k: Tensor, size: Tensor | None = None, *, scores: str = "mean") -> Tensor:
    """The scores [B, N] of `attend` without the attention and without gradient."""
    scale = q.shape[-1] ** -0.5
    return torch.ops.tokred.attention_scores(_padded(q), _padded(k), size, scale=scale, scores=scores)


def class_rows(q: Tensor, k: Tensor, size: Tensor | None = None) -> Tensor:
    """Row 0 of each head's attention matrix, [B, H, N], without gradient: heads are images of one head."""
    B, H, N, _ = k.shape
    if size is not None:
        size = size.repeat_interleave(H, 0)
    first, keys = (t.flatten(0, 1)[:, None] for t in (q[:, :, :1], k))
    return scores_alone(first, keys, size, scores="cls").view(B, H, N)


def _padded(t: Tensor) -> Tensor:
    """Heads [B, H, N, D] as wide as the ops want them; zeros change no logit."""
    return F.pad(t, (0, -t.shape[-1] % 8)) if t.shape[-1] % 8 else t
