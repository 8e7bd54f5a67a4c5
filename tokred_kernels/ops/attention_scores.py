"""attention_scores: the scores without the attention. Kernels: attention_scores in csrc/cpu, csrc/cuda and triton."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold
from .attention import _wide


def attention_scores(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, scores: str = "cls"
) -> Tensor:
    """The scores of `attention` alone, for use beside an attention that does not emit them.

    "cls" reads one query and all keys once: O(H N D). "mean" costs the logits of a whole attention.

    Args:
        q: [B, H, Nq, D], floating, D a multiple of 8 up to 128.
        k: [B, H, N, D] in the dtype of q, any strides.
        size, scale: as in `attention`.
        scores: "cls" or "mean".

    Returns:
        [B, N] float32 (float64 if q is), as `attention` defines it. No gradient: train through `attention`.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, unknown scores.
    """
    return torch.ops.tokred.attention_scores(q, k, size, scale=scale, scores=scores)


@torch.library.register_fake("tokred::attention_scores")
def _fake(q, k, size=None, *, scale=None, scores="cls"):
    _check.attention("attention_scores", q, k, None, size, scores)
    return q.new_empty(q.shape[0], k.shape[2], dtype=_wide(q.dtype))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.mark_non_differentiable(output)


def _backward(ctx, _grad):
    return None, None, None


torch.library.register_autograd("tokred::attention_scores", _backward, setup_context=_setup_context)


@torch.library.register_vmap("tokred::attention_scores")
def _vmap(info, in_dims, q, k, size=None, *, scale=None, scores="cls"):
    fold = BatchFold(info, in_dims)
    return fold.back(attention_scores(fold(q, 0), fold(k, 1), fold(size, 2), scale=scale, scores=scores)), 0
