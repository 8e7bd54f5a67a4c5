"""A brute-force oracle of attention in float64, written apart from the reference, and the checks that compare with it.

An error may be twice what PyTorch itself makes in the same dtype, plus a floor for the roundings that no kernel can do
without, so that a case in which PyTorch happens to be exact is no trap. NaN, infinities and zeros are exact: a masked
key's scores, a row without mass, a row with a NaN or +inf logit.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from attention_cases import AttentionCase
from torch import Tensor


def _wide(t: Tensor, dtype: torch.dtype) -> np.ndarray:
    """In float64; for float64 inputs in the 80 bits of long double, so that the oracle is the better of the two."""
    return t.cpu().double().numpy().astype(np.longdouble if dtype == torch.float64 else np.float64)


@dataclass
class Exact:
    """What attention must return, and per quantity the size of the numbers that are rounded on the way."""

    p: np.ndarray  # [B, H, Nq, N]
    out: np.ndarray  # [B, H, Nq, D]
    scores: np.ndarray  # [B, N], [B, 0] for none
    logit: float  # the largest finite |logit| of a key that counts
    value: float  # the largest finite |v| of a key that counts


def _finite_max(*arrays: np.ndarray) -> float:
    return max((float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in arrays), default=0.0)


def _row(logits: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Probabilities of the keys that count, for one query."""
    if np.isnan(logits).any() or (logits == np.inf).any():
        return np.full_like(logits, np.nan)
    if not (logits > -np.inf).any():
        return np.zeros_like(logits)
    mass = size * np.exp(logits - logits.max())
    return mass / mass.sum()


@np.errstate(all="ignore")
def exact(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, scale=None, scores="none") -> Exact:
    B, H, Nq, D = q.shape
    N = k.shape[2]
    scale = scale if scale is not None else 1 / np.sqrt(_wide(torch.tensor(max(D, 1.0)), q.dtype))
    Q, K, V = (_wide(t, q.dtype) for t in (q, k, v))
    sizes = np.ones((B, N), Q.dtype) if size is None else _wide(size, q.dtype)
    p, out = np.zeros((B, H, Nq, N), Q.dtype), np.zeros((B, H, Nq, D), Q.dtype)
    logit, value = 0.0, 0.0
    for b in range(B):
        counts = np.flatnonzero(sizes[b] > 0)  # the others are not looked at
        for h in range(H):
            logits, values = (Q[b, h] @ K[b, h, counts].T) * scale, V[b, h, counts]
            logit, value = max(logit, _finite_max(logits)), max(value, _finite_max(values))
            for i in range(Nq):
                row = _row(logits[i], sizes[b, counts])
                p[b, h, i, counts] = row
                if row.any():
                    out[b, h, i] = row @ values
    emitted = np.zeros((B, 0 if scores == "none" else N), Q.dtype)
    if scores != "none" and Nq > 0:
        for h in range(H):
            emitted += p[:, h, 0] / H if scores == "cls" else p[:, h].sum(1) / (H * Nq)
    return Exact(p, out, emitted, logit, value)


def _cleaned(k: Tensor, v: Tensor, size: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v with masked keys 0, and log size [B, 1, 1, N]: PyTorch has no other way to mask a key."""
    if size is None:
        return k, v, None
    keep = (size > 0)[:, None, :, None]
    mask = torch.where(size > 0, size, 0).to(wide).log()[:, None, None]
    return torch.where(keep, k, 0), torch.where(keep, v, 0), mask


def plain(q: Tensor, k: Tensor, size: Tensor | None, *, scale=None, scores="none") -> tuple[Tensor, Tensor]:
    """Explicit attention in the dtype of q, differentiable: (p, scores); k of masked keys must be finite."""
    scale = scale if scale is not None else max(q.shape[-1], 1) ** -0.5
    logits = q @ k.transpose(2, 3) * scale
    if size is not None:
        logits = logits + torch.where(size > 0, size, 0).log().to(q.dtype)[:, None, None]
    p = logits.softmax(3)
    return p, {"none": p.new_empty(len(p), 0), "cls": p[:, :, 0].mean(1), "mean": p.mean((1, 2))}[scores]


@np.errstate(invalid="ignore")
def _error(got: Tensor, want: np.ndarray) -> float:
    """The largest error where both are finite."""
    difference = np.abs(_wide(got, torch.float64) - want)
    return _finite_max(difference) if difference.size else 0.0


def _units(want: Exact, q: Tensor) -> float:
    """One float32 unit for p, one for its quotient; the sum of N masses, and the logits, which p is the exponential of.
    n numbers added in turn are off by about sqrt(n) roundings of 0.29 units each; a unit of +-1e4 is 1e4 of 1."""
    unit = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    N, D = want.p.shape[3], q.shape[3]
    return unit * (2 + N**0.5 / 4 + want.logit * max(1, D**0.5 / 4))


def bounds(want: Exact, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, *, scale=None, scores="none"):
    """The largest errors allowed in out and in scores.

    The floor of out: one unit in the last place of the largest result, which is rounded to its dtype, and `_units` of
    max |v|. The scores are float32 throughout.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    own_out = own_scores = 0.0
    k, v, mask = _cleaned(k, v, size, wide)
    if want.out.size > 0 and k.shape[2] > 0:
        own_out = _error(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), want.out)
    if want.scores.size > 0 and q.shape[2] > 0:
        own_scores = _error(plain(q.to(wide), k.to(wide), size, scale=scale, scores=scores)[1], want.scores)
    units = _units(want, q)
    floor_out = torch.finfo(q.dtype).eps * _finite_max(want.out) + units * want.value
    return 2 * own_out + floor_out, 2 * own_scores + units * _finite_max(want.scores)


def _same_kind(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """NaN, each infinity and everything finite in the same places."""
    for name, of in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        assert np.array_equal(of(got), of(want)), f"{what}: {name} in other places than it must be"


def _close(got: Tensor, want: np.ndarray, bound: float, what: str) -> None:
    assert got.shape == want.shape
    have = _wide(got, torch.float64)
    _same_kind(have, want, what)
    error = _error(got, want)
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"


def check_result(
    out: Tensor,
    scores: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    *,
    expected: tuple[Exact, tuple[float, float]] | None = None,
    **keywords,
) -> None:
    """Asserts values, exact zeros, NaN, dtypes and strides of what attention returned for these inputs."""
    want, (bound_out, bound_scores) = expected or _expected(q, k, v, size, **keywords)
    check_layout(out, q)
    assert scores.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    _close(out, want.out, bound_out, "out")
    _close(scores, want.scores, bound_scores, "scores")
    if want.p.shape[2] > 0:
        dead = ~want.p.any(3)  # rows without mass
        assert not out.double().cpu().numpy()[dead].any(), "out: a row without mass is not 0"
    if scores.shape[1] > 0 and size is not None:
        assert not scores.cpu()[~(size.cpu() > 0)].any(), "scores: a masked key's are not exactly 0"


def check_scores(scores: Tensor, case: AttentionCase) -> None:
    """attention_scores alone."""
    want, (_, bound) = expected(case)
    assert scores.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert scores.is_contiguous()
    _close(scores, want.scores, bound, "scores")
    size = case.size()
    if size is not None:
        assert not scores.cpu()[~(size > 0)].any(), "scores: a masked key's are not exactly 0"


def check_layout(t: Tensor, like: Tensor) -> None:
    """[B, N, H, D] in memory behind a [B, H, N, D]."""
    assert t.dtype == like.dtype
    assert t.shape == like.shape
    assert t.transpose(1, 2).is_contiguous()


def _expected(q, k, v, size=None, **keywords) -> tuple[Exact, tuple[float, float]]:
    want = exact(q, k, v, size, **keywords)
    return want, bounds(want, *(t.cpu() for t in (q, k, v)), None if size is None else size.cpu(), **keywords)


@lru_cache(maxsize=1024)  # more than the table
def expected(case: AttentionCase) -> tuple[Exact, tuple[float, float]]:
    """Calculated once for all backends."""
    return _expected(*case.qkv(), case.size(), **case.keywords)


def check(case: AttentionCase, out: Tensor, scores: Tensor) -> None:
    """Asserts that out and scores, from any device, are what attention must return for the case."""
    q, k, v = case.qkv()
    check_result(out, scores, q, k, v, case.size(), expected=expected(case))


@dataclass
class ExactGradients:
    """dq, dk, dv; and what rounding acts on: the largest sums of absolute terms, before those cancel, and what a
    rounding of every element of out by its own size does through sum p dP = <dO, out>."""

    values: tuple[np.ndarray, np.ndarray, np.ndarray]
    terms: tuple[float, float, float]
    through_out: tuple[float, float, float]


@np.errstate(all="ignore")
def exact_gradients(want: Exact, grad_out, grad_scores, q, k, v, size=None, *, scale=None, scores="none"):
    """Of <out, grad_out> + <scores, grad_scores> by the chain rule, row by row."""
    B, H, Nq, D = q.shape
    N = k.shape[2]
    scale = scale if scale is not None else 1 / np.sqrt(_wide(torch.tensor(max(D, 1.0)), q.dtype))
    Q, K, V = (_wide(t, q.dtype) for t in (q, k, v))
    values, terms, through = (tuple(np.zeros_like(t) for t in (Q, K, V)) for _ in range(3))
    dO = np.zeros_like(Q) if grad_out is None else _wide(grad_out, q.dtype)
    for b in range(B):
        counts = np.arange(N) if size is None else np.flatnonzero(size[b].cpu().numpy() > 0)
        g = np.zeros(len(counts), Q.dtype)
        if grad_scores is not None and scores != "none":
            g = _wide(grad_scores, q.dtype)[b, counts] / (H if scores == "cls" else H * max(Nq, 1))
        for h in range(H):
            p = want.p[b, h][:, counts]  # 0 in a row without mass
            dP = dO[b, h] @ V[b, h, counts].T
            dP[: 1 if scores == "cls" else Nq] += g
            of_out = np.sqrt(((dO[b, h] * want.out[b, h]) ** 2).sum(1, keepdims=True))
            dS = p * (dP - (p * dP).sum(1, keepdims=True))
            apart = p * (np.abs(dP) + (p * np.abs(dP)).sum(1, keepdims=True))
            for into, of_logits, of_p, absolute in (
                (values, dS, p, lambda t: t),
                (terms, apart, p, np.abs),
                (through, p * of_out, 0 * p, np.abs),
            ):
                into[0][b, h] = abs(scale) * of_logits @ absolute(K[b, h, counts])
                into[1][b, h, counts] = abs(scale) * of_logits.T @ absolute(Q[b, h])
                into[2][b, h, counts] = of_p.T @ absolute(dO[b, h])
    if scale < 0:
        values[0][:], values[1][:] = -values[0], -values[1]
    return ExactGradients(values, *(tuple(_finite_max(t) for t in group) for group in (terms, through)))


def _own_gradients(grad_out, grad_scores, q, k, v, size, **keywords) -> tuple[Tensor, Tensor, Tensor]:
    """What PyTorch's autograd gives through explicit attention in the dtype of q."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v, _ = _cleaned(k, v, size, wide)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    p, scores = plain(*leaves[:2], size, **keywords)
    loss = scores.sum() * 0 if grad_scores is None else (scores * grad_scores).sum()
    loss = loss if grad_out is None else loss + (p @ leaves[2] * grad_out).float().sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@lru_cache(maxsize=1024)
def expected_gradients(case: AttentionCase, with_out: bool, with_scores: bool) -> tuple[tuple, tuple]:
    """dq, dk, dv of a case with finite inputs, and the largest error allowed in each.

    The floor: one unit in the last place of the largest result; float32 units of the terms that add up to it, as in
    `bounds`; and the rounding of out.
    """
    q, k, v, size = *case.qkv(), case.size()
    given = _given(case, with_out, with_scores)
    want = expected(case)[0]
    exactly = exact_gradients(want, *given, q, k, v, size, **case.keywords)
    own = [torch.zeros(g.shape) for g in exactly.values]
    if min(*q.shape, *k.shape) > 0:
        own = _own_gradients(*given, q, k, v, size, **case.keywords)
    last, units = torch.finfo(case.dtype).eps, _units(want, q)
    allowed = [
        2 * _error(from_torch, value) + last * (_finite_max(value) + through) + units * terms
        for from_torch, value, terms, through in zip(
            own, exactly.values, exactly.terms, exactly.through_out, strict=True
        )
    ]
    return exactly.values, tuple(allowed)


def _given(case: AttentionCase, with_out: bool, with_scores: bool) -> tuple[Tensor | None, Tensor | None]:
    grad_out, grad_scores = case.grads()
    return grad_out if with_out else None, grad_scores if with_scores else None


def check_gradients(case: AttentionCase, grads, with_out: bool = True, with_scores: bool = True) -> None:
    """Asserts values, exact zeros, dtypes and strides of dq, dk, dv from case.grads(), or from one of the two."""
    size = case.size()
    want, allowed = expected_gradients(case, with_out, with_scores)
    for name, got, exactly, bound, like in zip(("dq", "dk", "dv"), grads, want, allowed, case.qkv(), strict=True):
        check_layout(got, like)
        _close(got, exactly, bound, name)
        if name != "dq" and size is not None:
            masked = ~(size > 0)
            assert not got.cpu().transpose(1, 2)[masked].any(), f"{name}: a masked key's is not exactly 0"
