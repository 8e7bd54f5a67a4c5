"""Is the result right? Each op call of a forward against the specification, and logits against logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference, reference_clusters
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
            ops.add_merge_norm.default: self._merge_norm,
            ops.add_topk_gather_norm.default: self._select_norm,
            ops.topk.default: self._exactly(reference.topk),
            ops.topk_gather.default: self._select,
            ops.attention.default: self._attend,
            ops.attention_scores.default: self._score,
            ops.pairwise_distance.default: self._measure,
            ops.knn.default: self._exactly(reference_clusters.knn),
            ops.separation.default: self._exactly(reference_clusters.separation),
            ops.nearest.default: self._exactly(reference_clusters.nearest),
            ops.medoids.default: self._exactly(reference_clusters.medoids),
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.checks:
            self.checks[func](result, *args, **(kwargs or {}))
        return result

    def _exactly(self, specification: Callable) -> Callable[..., None]:
        """For ops that choose on exact inputs, or whose sums are exact to the last bit."""

        def check(result: Tensor | tuple[Tensor, ...], *args, **options) -> None:
            got, want = (t if isinstance(t, tuple) else (t,) for t in (result, specification(*args, **options)))
            self._counted(got[-1])
            self.check.wrong += sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))

        return check

    def _match(
        self,
        assign: Tensor,
        metric: Tensor,
        r: int,
        prefix: int = 1,
        weight: Tensor | None = None,
        *,
        power: float = 1.0,
        two_way: bool = False,
    ) -> None:
        check = self._counted(assign)
        different = assign != reference.match(metric, r, prefix, weight, power=power, two_way=two_way)
        if two_way:
            right = ~different.any(1)
            excused = right | undecided(metric, r, prefix, weight, power)
        else:
            excused = within_margin(metric, assign, r, prefix, weight, power)
        check.near_ties += int(different[excused].sum())
        check.wrong += int((~excused).sum())

    def _merge(self, result, *args, **options) -> None:
        out, size_out = result
        want, want_size = reference.merge(*args, **options)
        self.check.error = max(self.check.error, _relative_error(out, want))
        self.check.wrong += int((size_out != want_size).sum())

    def _merge_norm(self, result, *args, **kwargs) -> None:
        out, size_out, normed = result
        want, want_size, want_normed = reference.add_merge_norm(*args, **kwargs)
        errors = (_relative_error(out, want), _relative_error(normed, want_normed))
        self.check.error = max(self.check.error, *errors)
        self.check.wrong += int((size_out != want_size).sum())

    def _select(self, result, x: Tensor, score: Tensor, k: int, prefix: int = 1, *, fuse: str = "none") -> None:
        out, assign = result
        check = self._counted(assign)
        want, want_assign = reference.topk_gather(x, score, k, prefix, fuse=fuse)
        check.wrong += int((assign != want_assign).sum())  # equal scores: no near-tie to excuse
        check.error = max(check.error, _relative_error(out, want))

    def _select_norm(self, result, *args, **kwargs) -> None:
        out, assign, normed = result
        check = self._counted(assign)
        want, want_assign, want_normed = reference.add_topk_gather_norm(*args, **kwargs)
        check.wrong += int((assign != want_assign).sum())
        check.error = max(check.error, _relative_error(out, want), _relative_error(normed, want_normed))

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

    def _score(self, result, q, k, size=None, *, scale=None, scores: str = "cls") -> None:
        exact = reference.attention_scores(q.double(), k.double(), size, scale=scale, scores=scores)
        self.check.attention = max(self.check.attention, _relative_error(result, exact) / 1e-4)

    def _measure(self, distance: Tensor, x: Tensor, *, scale: float = 1.0) -> None:
        """Within 1e-6 of the largest, and what keeps ties exact: symmetric, 0 on the diagonal."""
        exact = reference_clusters.pairwise_distance(x.double(), scale=scale)
        self.check.wrong += int((distance != distance.mT).sum() + distance.diagonal(dim1=1, dim2=2).count_nonzero())
        self.check.wrong += int(((distance - exact).abs() > 1e-6 * exact.amax((1, 2), keepdim=True)).sum())

    def _counted(self, assign: Tensor) -> StepCheck:
        self.check.steps += 1
        self.check.tokens += assign.numel()
        return self.check


def _relative_error(out: Tensor, want: Tensor) -> float:
    """The largest |out - want| over the largest |want|; 0 if they are empty."""
    if want.numel() == 0:
        return 0.0
    return float((out - want).abs().amax() / want.abs().amax().clamp(min=torch.finfo(want.dtype).tiny))


def within_margin(
    metric: Tensor, assign: Tensor, r: int, prefix: int = 1, weight: Tensor | None = None, power: float = 1.0
) -> Tensor:
    """For each image, whether assign is an answer of one-way `match` up to scores closer than MARGIN: bool [B]."""
    N = assign.shape[1]
    r = max(0, min(r, (N - prefix) // 2))
    if r == 0:
        return (assign == torch.arange(N, device=assign.device)).all(1)
    score = reference.match_scores(metric.double(), prefix, weight, power)  # [B, Na, Nb]
    margin = _margin(score, weight)
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
    right &= (~gone | (chosen >= best - margin)).all(1)
    lowest_gone = best.masked_fill(~gone, torch.inf).amin(1)
    highest_kept = best.masked_fill(gone, -torch.inf).amax(1)
    return right & (lowest_gone >= highest_kept - margin[:, 0])


def undecided(metric: Tensor, r: int, prefix: int = 1, weight: Tensor | None = None, power: float = 1.0) -> Tensor:
    """For each image, whether two-way `match` has scores closer than MARGIN wherever it compares them: bool [B].

    An assignment alone does not tell which of two near-ties fell: a token of a may have moved on with its partner.
    """
    score = reference.match_scores(metric.double(), prefix, weight, power)
    r = max(0, min(r, (metric.shape[-2] - prefix) // 2))
    margin = _margin(score, weight)
    close = _close(score, r // 2, margin)
    order = score.amax(2).sort(dim=1, descending=True, stable=True).indices[:, r // 2 :].sort(1).values
    back = score.gather(1, order[..., None].expand(-1, -1, score.shape[2])).mT
    in_order = back.amax(2).sort(1, descending=True).values
    return close | _close(back, r - r // 2, margin) | ~(in_order[:, :-1] - in_order[:, 1:] >= margin).all(1)


def _close(score: Tensor, r: int, margin: Tensor) -> Tensor:
    """Whether one of the r best edges is nearly another one: bool [B]. score [B, rows, columns]; margin [B, 1]."""
    best = score.topk(min(2, score.shape[2]), 2).values
    edges, order = best[..., 0].sort(1, descending=True)
    close = (best[..., 0] - best[..., -1] < margin).gather(1, order)[:, :r].any(1) & (score.shape[2] > 1)
    if 0 < r < score.shape[1]:
        close |= edges[:, r - 1] - edges[:, r] < margin[:, 0]
    return close


def _margin(score: Tensor, weight: Tensor | None) -> Tensor:
    """[B, 1]: MARGIN, times what weights multiply a cosine with at most."""
    if weight is None:
        return score.new_full((score.shape[0], 1), MARGIN)
    return MARGIN * weight.double().amax(1, keepdim=True).square()


def cosine(a: Tensor, b: Tensor) -> float:
    """The smallest cosine between rows of a and of b, [B, classes] each; 1 for equal rows, also of zeros."""
    similar = F.cosine_similarity(a.double(), b.double(), dim=-1)
    return float(similar.masked_fill((a == b).all(-1), 1).min())


def same_top1(a: Tensor, b: Tensor) -> int:
    """How many rows of a and b [B, classes] have their largest entry in the same place."""
    return int((a.argmax(-1) == b.argmax(-1)).sum())
