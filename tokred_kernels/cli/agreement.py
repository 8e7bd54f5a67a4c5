"""Is the result right? Each op call of a forward against the specification, and logits against logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference
from ..models._size import key_mask

# Two scores this close may fall either way: each is within 1e-6 of the exact one (the precision rule of `match`).
MARGIN = 2e-6


@dataclass
class StepCheck:
    """Outcome of checking each reduction and each attention of a forward on its own inputs."""

    steps: int = 0
    tokens: int = 0
    near_ties: int = 0  # tokens assigned otherwise than by the reference, their scores within MARGIN
    wrong: int = 0  # tokens assigned otherwise with no such excuse, or images whose rows are out of order
    error: float = 0.0  # of a reduction: largest |out - reference| over the largest |reference|
    attention: float = 0.0  # of our attention: largest error over the one allowed, see `_attend`

    def passed(self, dtype: torch.dtype) -> bool:
        """No wrong token, and outputs within a few roundings of the reference."""
        return self.wrong == 0 and self.error <= 4 * torch.finfo(dtype).eps and self.attention <= 1


class StepChecker(TorchDispatchMode):
    """Inside this `with`, each call of the ops in `checks` is repeated by reference.py on the same inputs and compared.

    Comparing step by step matters: over a whole model, one near-tie that falls the other way changes all that follows.
    """

    def __init__(self):
        super().__init__()
        self.check = StepCheck()
        ops = torch.ops.tokred
        self.checks = {
            ops.match.default: self._match,
            ops.merge.default: self._merge,
            ops.topk_gather.default: self._select,
            ops.attention.default: self._attend,
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.checks:
            self.checks[func](result, *args, **(kwargs or {}))
        return result

    def _match(self, assign: Tensor, metric: Tensor, r: int, prefix: int = 1) -> None:
        check = self._counted(assign)
        different = assign != reference.match(metric, r, prefix)
        excused = within_margin(metric, assign, r, prefix)
        check.near_ties += int(different[excused].sum())
        check.wrong += int((~excused).sum())

    def _merge(self, result, *args, **options) -> None:
        out, size_out = result
        want, want_size = reference.merge(*args, **options)
        self.check.error = max(self.check.error, _relative_error(out, want))
        self.check.wrong += int((size_out != want_size).sum())

    def _select(self, result, x: Tensor, score: Tensor, k: int, prefix: int = 1, *, fuse: str = "none") -> None:
        out, assign = result
        check = self._counted(assign)
        want, want_assign = reference.topk_gather(x, score, k, prefix, fuse=fuse)
        check.wrong += int((assign != want_assign).sum())  # equal scores: no near-tie to excuse
        check.error = max(check.error, _relative_error(out, want))

    def _attend(self, result, q, k, v, size=None, *, scale=None, scores: str = "none") -> None:
        """out may err by twice what torch's own attention errs in this dtype, and one rounding; scores by 1e-4 of the
        largest. Image by image: the float64 matrices of a batch may not fit."""
        for n in range(len(q)):
            out, emitted = (t[n : n + 1] for t in result)
            one = [t[n : n + 1] for t in (q, k, v)]
            weight = None if size is None else size[n : n + 1]
            exact, exact_scores = reference.attention(*(t.double() for t in one), weight, scale=scale, scores=scores)
            mask = None if weight is None else key_mask(weight, q.dtype)
            usual = F.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale)
            allowed = 2 * _relative_error(usual, exact) + torch.finfo(q.dtype).eps
            ratios = [_relative_error(out, exact) / allowed, _relative_error(emitted, exact_scores) / 1e-4]
            self.check.attention = max(self.check.attention, *ratios)

    def _counted(self, assign: Tensor) -> StepCheck:
        self.check.steps += 1
        self.check.tokens += assign.numel()
        return self.check


def _relative_error(out: Tensor, want: Tensor) -> float:
    """The largest |out - want| over the largest |want|; 0 if they are empty."""
    if want.numel() == 0:
        return 0.0
    return float((out - want).abs().amax() / want.abs().amax().clamp(min=torch.finfo(want.dtype).tiny))


def within_margin(metric: Tensor, assign: Tensor, r: int, prefix: int = 1) -> Tensor:
    """For each image, whether assign is an answer of `match` up to scores that differ by less than MARGIN: bool [B]."""
    N = assign.shape[1]
    r = max(0, min(r, (N - prefix) // 2))
    if r == 0:
        return (assign == torch.arange(N, device=assign.device)).all(1)
    score = reference.match_scores(metric.double(), prefix)  # [B, Na, Nb]
    Na, Nb = score.shape[1:]
    first_b_row = prefix + Na - r
    row_a = assign[:, prefix + prefix % 2 :: 2].long()
    row_b = assign[:, prefix + 1 - prefix % 2 :: 2].long()
    gone = row_a >= first_b_row
    best = score.amax(2)
    chosen = score.gather(2, (row_a - first_b_row).clamp(0, max(Nb - 1, 0))[..., None])[..., 0]

    right = (assign[:, :prefix] == torch.arange(prefix, device=assign.device)).all(1)
    right &= (row_b == first_b_row + torch.arange(Nb, device=assign.device)).all(1)
    right &= (torch.where(gone, 0, row_a - prefix - (~gone).cumsum(1) + 1) == 0).all(1)  # kept: ascending
    right &= (gone.sum(1) == r) & (row_a < N - r).all(1)
    right &= (~gone | (chosen >= best - MARGIN)).all(1)
    lowest_gone = best.masked_fill(~gone, torch.inf).amin(1)
    highest_kept = best.masked_fill(gone, -torch.inf).amax(1)
    return right & (lowest_gone >= highest_kept - MARGIN)


def cosine(a: Tensor, b: Tensor) -> float:
    """The smallest cosine between rows of a and of b, [B, classes] each; 1 for equal rows, also of zeros."""
    similar = F.cosine_similarity(a.double(), b.double(), dim=-1)
    return float(similar.masked_fill((a == b).all(-1), 1).min())


def same_top1(a: Tensor, b: Tensor) -> int:
    """How many rows of a and b [B, classes] have their largest entry in the same place."""
    return int((a.argmax(-1) == b.argmax(-1)).sum())
