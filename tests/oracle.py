"""A brute-force oracle in float64, written apart from the reference, and the checks that compare with it.

Selections must be equal wherever float64 decides them by more than the precision rule of match allows (2e-6 between two
scores); equal rows must tie exactly. Sums must be within the rounding that their float32 accumulation explains.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

MARGIN = 2e-6  # two scores, each within 1e-6 of exact
FLOAT32_MAX = float(np.finfo(np.float32).max)


def edge_scores(metric: Tensor, p: int, weight: Tensor | None = None, power: float = 1.0):
    """One image: (score [Na, Nb] float64 with NaN as -inf, keys a, keys b); metric [N, D] or [H, N, D]."""
    single = metric.dtype != torch.float64
    k = metric.double().numpy()
    with np.errstate(all="ignore"):
        mean = k if k.ndim == 2 else k.sum(0) / k.shape[0]
        squares = (mean**2).sum(-1, keepdims=True)
        norm = np.where(single & (squares > FLOAT32_MAX), np.inf, np.sqrt(squares))
        unit = mean * (1 / np.maximum(norm, 1e-6))
        a, b = p + p % 2, p + 1 - p % 2
        score = (unit[a::2, None, :] * unit[None, b::2, :]).sum(-1)
        if weight is not None:
            w = weight.double().numpy()
            score = np.maximum((score + 1) / 2, 0) ** power * w[a::2, None] * w[None, b::2]
    score[np.isnan(score)] = -np.inf
    flat = k.reshape(1, *k.shape) if k.ndim == 2 else k
    rows = flat.transpose(1, 0, 2).reshape(k.shape[-2], flat.shape[0] * k.shape[-1])
    rows = np.where(unit.any(-1, keepdims=True), rows, 0)  # a row of norm infinity has scores of exactly 0
    if weight is not None:
        rows = np.concatenate([rows, weight.double().numpy()[:, None]], 1)
    return score, rows[a::2], rows[b::2]


def match_image(score: np.ndarray, N: int, p: int, r: int) -> np.ndarray:
    """assign [N] from scores, by the order rule, with plain loops."""
    assign = np.arange(N)
    if r == 0:
        return assign
    Na, Nb = score.shape
    dst = score.argmax(1)  # the first of equal ones
    order = sorted(range(Na), key=lambda i: (-score[i, dst[i]], i))
    gone = set(order[:r])
    first_b, row = p + Na - r, p
    for i in range(Na):
        token = p + p % 2 + 2 * i
        if i in gone:
            assign[token] = first_b + dst[i]
        else:
            assign[token], row = row, row + 1
    for j in range(Nb):
        assign[p + 1 - p % 2 + 2 * j] = first_b + j
    return assign


def match_image_two_way(score: np.ndarray, N: int, p: int, r: int) -> np.ndarray:
    """assign [N] of both directions: who merges into whom, then the kept in their order, then everyone to the end."""
    if r == 0:
        return np.arange(N)
    Na, Nb = score.shape
    a, b = range(p + p % 2, N, 2), range(p + 1 - p % 2, N, 2)  # tokens
    into = {}
    by_edge = sorted(range(Na), key=lambda i: (-score[i].max(), i))
    for i in by_edge[: r // 2]:
        into[a[i]] = b[score[i].argmax()]
    kept = sorted(by_edge[r // 2 :])
    back = score[kept]
    by_edge = sorted(range(Nb), key=lambda j: (-back[:, j].max(), j))
    for j in by_edge[: r - r // 2]:
        into[b[j]] = a[kept[back[:, j].argmax()]]
    tokens = [*range(p), *(a[i] for i in kept), *(b[j] for j in by_edge[r - r // 2 :])]
    row = {token: n for n, token in enumerate(tokens)}
    assign = np.empty(N, np.int64)
    for token in range(N):
        end = token
        while end in into:
            end = into[end]
        assign[token] = row[end]
    return assign


def _same(rows: np.ndarray) -> bool:
    return all(np.array_equal(rows[0], row, equal_nan=True) for row in rows[1:])


def decided(score: np.ndarray, a: np.ndarray, b: np.ndarray, r: int, margin: float) -> bool:
    """Whether float64 decides every choice by more than the margin, or by an exact tie of equal rows."""
    Na = score.shape[0]
    if Na == 0 or r == 0:
        return True
    best = score.max(1)
    for i in range(Na):
        near = np.flatnonzero(score[i] >= best[i] - margin) if np.isfinite(best[i]) else np.array([0])
        if not _same(b[near]):
            return False
    cut = np.sort(best)[::-1][r - 1]
    if r == Na or not np.isfinite(cut):
        return True
    near = np.flatnonzero(np.abs(best - cut) <= margin)
    above = (best > cut + margin).sum()
    return above + len(near) == r or _same(a[near])


def decided_two_way(score: np.ndarray, a: np.ndarray, b: np.ndarray, r: int, margin: float) -> bool:
    """As `decided`, of both directions and of the order of b."""
    if score.shape[0] == 0 or r == 0:
        return True
    if not decided(score, a, b, r // 2, margin):
        return False
    kept = np.sort(np.argsort(-score.max(1), kind="stable")[r // 2 :])
    back = score[kept].T
    if not decided(back, b, a[kept], r - r // 2, margin):
        return False
    best = back.max(1)
    order = np.argsort(-best, kind="stable")
    pairs = [(i, j) for i, j in itertools.pairwise(order) if np.isfinite(best[j])]
    return all(best[i] - best[j] > margin or _same(b[[i, j]]) for i, j in pairs)


def check_assign(
    assign: Tensor,
    metric: Tensor,
    r: int,
    p: int,
    weight: Tensor | None = None,
    power: float = 1.0,
    two_way: bool = False,
) -> int:
    """Asserts that assign [B, N] is what match must return; returns how many images float64 decides clearly."""
    B, N = assign.shape
    assert assign.dtype == torch.int32
    r = max(0, min(r, (N - p) // 2))
    clear = 0
    for n in range(B):
        got = assign[n].numpy()
        w = None if weight is None else weight[n].cpu()
        score, a, b = edge_scores(metric[n].cpu(), p, w, power)
        margin = MARGIN * (1 if w is None else w.double().nan_to_num(0).square().max().item() if N else 1)
        if (decided_two_way if two_way else decided)(score, a, b, r, margin):
            clear += 1
            want = (match_image_two_way if two_way else match_image)(score, N, p, r)
            np.testing.assert_array_equal(got, want)
        else:
            (_check_undecided_two_way if two_way else _check_undecided)(got, score, N, p, r, margin)
    return clear


def _check_undecided(got: np.ndarray, score: np.ndarray, N: int, p: int, r: int, margin: float) -> None:
    """A choice within the margin may fall either way, everything else may not."""
    Na, Nb = score.shape
    first_b = p + Na - r
    np.testing.assert_array_equal(got[:p], np.arange(p))
    np.testing.assert_array_equal(got[p + 1 - p % 2 :: 2], first_b + np.arange(Nb))
    of_a = got[p + p % 2 :: 2]
    gone = of_a >= first_b
    assert gone.sum() == r
    np.testing.assert_array_equal(of_a[~gone], p + np.arange(Na - r))
    best = score.max(1)
    chosen = score[np.flatnonzero(gone), of_a[gone] - first_b]
    assert (chosen >= best[gone] - margin).all()
    if 0 < r < Na:
        assert best[gone].min() >= best[~gone].max() - margin


def _check_undecided_two_way(got: np.ndarray, score: np.ndarray, N: int, p: int, r: int, margin: float) -> None:
    """As `_check_undecided`. A row of an a may also hold other a, that followed a b to it: some choice of the one that
    stayed must be within the margin in everything."""
    Na = score.shape[0]
    best = score.max(1)
    cut = np.sort(best)[::-1][r // 2 - 1] if r // 2 else np.inf
    np.testing.assert_array_equal(got[:p], np.arange(p))
    np.testing.assert_array_equal(np.unique(got), np.arange(N - r))
    of_a, of_b = got[p + p % 2 :: 2], got[p + 1 - p % 2 :: 2]
    stayed = [[i for i in np.flatnonzero(of_a == p + c) if best[i] <= cut + margin] for c in range(Na - r // 2)]
    surely = [[i for i in row if best[i] < cut - margin] for row in stayed]
    choices = itertools.product(*(sure or row for sure, row in zip(surely, stayed, strict=True)))
    assert any(_within_two_way(list(kept), of_a, of_b, score, p, r, margin) for kept in choices)


def _within_two_way(kept: list, of_a: np.ndarray, of_b: np.ndarray, score: np.ndarray, p: int, r: int, margin) -> bool:
    """Whether the rows of a and b are right within the margin, if `kept` are the a that stayed."""
    Na = score.shape[0]
    first_b = p + Na - r // 2
    gone = np.setdiff1d(np.arange(Na), kept)
    back = score[kept]
    best, best_back = score.max(1), back.max(0)
    gone_b = of_b < first_b
    order = np.argsort(of_b[~gone_b])
    falling = best_back[~gone_b][order]
    later = np.maximum.accumulate(falling[::-1])[::-1]
    return (
        kept == sorted(set(kept))
        and len(kept) == Na - r // 2
        and gone_b.sum() == r - r // 2
        and all((score[i, of_b == of_a[i]] >= best[i] - margin).any() for i in gone)
        and (best[gone].min(initial=np.inf) >= best[kept].max() - margin)
        and (back[of_b[gone_b] - p, np.flatnonzero(gone_b)] >= best_back[gone_b] - margin).all()
        and (falling >= later - margin).all()
        and (best_back[gone_b].min() >= falling.max(initial=-np.inf) - margin)
    )


def merge(x: Tensor, assign: Tensor, m: int, size=None, weight=None, reduce: str = "mean"):
    """(out, size_out, slack) in float64; slack bounds the error of a float32 accumulation before the final rounding."""
    B, N, C = x.shape
    X = x.double().cpu().numpy()
    ones = np.ones((B, N))
    sizes = ones if size is None else size.double().cpu().numpy()
    w = ones if reduce == "sum" or size is None else sizes
    w = w if weight is None else weight.double().cpu().numpy()
    out, size_out, slack = np.zeros((B, m, C)), np.zeros((B, m)), np.zeros((B, m, C))
    rows = assign.cpu().numpy()
    with np.errstate(all="ignore"):
        for b in range(B):
            for j in np.unique(rows[b]):
                if not 0 <= j < m:
                    continue
                i = np.flatnonzero(rows[b] == j)
                size_out[b, j] = sizes[b, i].sum()
                values, wi = X[b, i], w[b, i, None]
                if reduce == "amax":
                    out[b, j] = values.max(0)
                elif len(i) == 1 and reduce == "mean":
                    out[b, j] = values[0]
                else:
                    if reduce == "mean" and wi.sum() == 0:
                        wi = np.ones_like(wi)
                    total = wi.sum() if reduce == "mean" else 1.0
                    out[b, j] = (wi * values).sum(0) / total
                    slack[b, j] = (len(i) + 2) * 2.0**-23 * np.abs(wi * values).sum(0) / abs(total)
    return torch.from_numpy(out), torch.from_numpy(size_out), torch.from_numpy(slack)


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def all_same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(same(one, other) for one, other in zip(a, b, strict=True))


def check_values(out: Tensor, want: Tensor, slack: Tensor) -> None:
    """Asserts that out is `want`, within `slack`, rounded to its dtype: NaN and infinities in the same places."""
    limits = torch.finfo(out.dtype)
    rounded = want.to(out.dtype).double()  # an overflow of the result's dtype is an infinity here too
    have = out.double().cpu()
    assert torch.equal(have.isnan(), rounded.isnan())
    finite = rounded.isfinite()
    edge = want.abs() + slack >= limits.max * (1 - limits.eps)  # may round to infinity or to the largest number
    assert torch.equal(have[~finite & ~edge & ~rounded.isnan()], rounded[~finite & ~edge & ~rounded.isnan()])
    bound = slack + limits.eps / 2 * want.abs() + limits.smallest_normal * limits.eps  # half a unit in the last place
    error = (have - want).abs()
    ok = error[finite & ~edge] <= bound[finite & ~edge]
    assert ok.all(), f"error {error[finite & ~edge].max():.3g} above its rounding bound"
    exact = slack == 0
    assert torch.equal(have[exact & finite], rounded[exact & finite])


def check_merge(
    got: tuple[Tensor, Tensor], x: Tensor, assign: Tensor, m: int, size=None, weight=None, reduce="mean"
) -> None:
    """Asserts values within rounding, NaN and infinities in the same places, copies and sizes exact."""
    out, size_out = got
    want, want_size, slack = merge(x, assign, m, size, weight, reduce)
    assert out.dtype == x.dtype
    assert out.shape == want.shape
    check_values(out, want, slack)
    torch.testing.assert_close(size_out.double().cpu(), want_size, rtol=2.0**-22, atol=0, equal_nan=True)
