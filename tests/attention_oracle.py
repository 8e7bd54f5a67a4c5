"""A brute-force oracle of attention in float64, written apart from the reference, and the checks that compare with it.

An error may be twice what PyTorch itself makes in the same dtype, plus a floor for the roundings that no kernel can do
without, so that a case in which PyTorch happens to be exact is no trap. NaN, infinities and zeros are exact: a masked
key's scores, a row without mass, a row with a NaN or +inf logit.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from attention_cases import AttentionCase
from torch import Tensor

EPS32 = 2.0**-23


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
        logits = logits + torch.where(size > 0, size, 0).to(q.dtype).log()[:, None, None]
    p = logits.softmax(3)
    return p, {"none": p.new_empty(len(p), 0), "cls": p[:, :, 0].mean(1), "mean": p.mean((1, 2))}[scores]


@np.errstate(invalid="ignore")
def _error(got: Tensor, want: np.ndarray) -> float:
    """The largest error where both are finite."""
    difference = np.abs(_wide(got, torch.float64) - want)
    return _finite_max(difference) if difference.size else 0.0


def bounds(want: Exact, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, *, scale=None, scores="none"):
    """The largest errors allowed in out and in scores.

    The floor of out: one unit in the last place of the largest result, which is rounded to its dtype; and of
    max |v| one float32 unit each for p and the sum, and the logits' error, which p is the exponential of: D products
    added in turn are off by about sqrt(D) roundings of 0.29 units each, and a unit of +-1e4 is 1e4 of 1. The scores are
    float32 throughout.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    own_out = own_scores = 0.0
    k, v, mask = _cleaned(k, v, size, wide)
    if want.out.size > 0 and k.shape[2] > 0:
        own_out = _error(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), want.out)
    if want.scores.size > 0 and q.shape[2] > 0:
        own_scores = _error(plain(q.to(wide), k.to(wide), size, scale=scale, scores=scores)[1], want.scores)
    unit = torch.finfo(wide).eps
    rounded = unit * (2 + want.logit * max(1, q.shape[3] ** 0.5 / 4))
    floor_out = torch.finfo(q.dtype).eps * _finite_max(want.out) + rounded * want.value
    return 2 * own_out + floor_out, 2 * own_scores + rounded * _finite_max(want.scores)


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


@cache
def expected(case: AttentionCase) -> tuple[Exact, tuple[float, float]]:
    """Calculated once for all backends."""
    return _expected(*case.qkv(), case.size(), **case.keywords)


def check(case: AttentionCase, out: Tensor, scores: Tensor) -> None:
    """Asserts that out and scores, from any device, are what attention must return for the case."""
    q, k, v = case.qkv()
    check_result(out, scores, q, k, v, case.size(), expected=expected(case))


@dataclass
class ExactGradients:
    grads: tuple[np.ndarray, np.ndarray, np.ndarray]
    bounds: tuple[float, float, float]


@np.errstate(all="ignore")
def exact_gradients(want: Exact, grad_out, grad_scores, q, k, v, size=None, *, scale=None, scores="none"):
    """dq, dk, dv of <out, grad_out> + <scores, grad_scores> by the chain rule, row by row."""
    B, H, Nq, D = q.shape
    N = k.shape[2]
    scale = scale if scale is not None else 1 / np.sqrt(_wide(torch.tensor(max(D, 1.0)), q.dtype))
    Q, K, V = (_wide(t, q.dtype) for t in (q, k, v))
    dQ, dK, dV = (np.zeros_like(t) for t in (Q, K, V))
    dO = np.zeros_like(Q) if grad_out is None else _wide(grad_out, q.dtype)
    for b in range(B):
        counts = np.arange(N) if size is None else np.flatnonzero(size[b].cpu().numpy() > 0)
        g = np.zeros(len(counts), Q.dtype)
        if grad_scores is not None and scores != "none":
            g = _wide(grad_scores, q.dtype)[b, counts] / (H if scores == "cls" else H * max(Nq, 1))
        for h in range(H):
            keys, values = K[b, h, counts], V[b, h, counts]
            for i in range(Nq):
                p = want.p[b, h, i, counts]
                if not p.any():
                    continue
                dP = values @ dO[b, h, i] + (g if scores == "mean" or i == 0 else 0)
                dS = p * (dP - p @ dP)
                dQ[b, h, i] = scale * (dS @ keys)
                dK[b, h, counts] += scale * np.outer(dS, Q[b, h, i])
                dV[b, h, counts] += np.outer(p, dO[b, h, i])
    return dQ, dK, dV


def _own_gradients(grad_out, grad_scores, q, k, v, size, **keywords) -> tuple[Tensor, Tensor, Tensor]:
    """What PyTorch's autograd gives through explicit attention in the dtype of q."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v, _ = _cleaned(k, v, size, wide)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    p, scores = plain(*leaves[:2], size, **keywords)
    loss = scores.sum() * 0 if grad_scores is None else (scores * grad_scores).sum()
    loss = loss if grad_out is None else loss + (p @ leaves[2] * grad_out).float().sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def check_gradients(case: AttentionCase, grads, grad_out: Tensor | None, grad_scores: Tensor | None) -> None:
    """Asserts values, exact zeros, dtypes and strides of dq, dk, dv for a case with finite inputs.

    The floor: a few float32 roundings of the largest gradient (dP - sum p dP cancels) and of the logits, and one of
    the result's dtype.
    """
    q, k, v = case.qkv()
    size = case.size()
    want = expected(case)[0]
    gradients = exact_gradients(want, grad_out, grad_scores, q, k, v, size, **case.keywords)
    if min(*q.shape, *k.shape) > 0:
        own = _own_gradients(grad_out, grad_scores, q, k, v, size, **case.keywords)
    else:
        own = [torch.zeros(g.shape) for g in gradients]
    unit = torch.finfo(torch.float64).eps if case.dtype == torch.float64 else EPS32
    for name, got, exactly, from_torch, like in zip(("dq", "dk", "dv"), grads, gradients, own, (q, k, v), strict=True):
        check_layout(got, like)
        floor = (torch.finfo(case.dtype).eps + unit * (8 + want.logit)) * _finite_max(exactly)
        _close(got, exactly, 2 * _error(from_torch, exactly) + floor, name)
        if name != "dq" and size is not None:
            masked = ~(size > 0)
            assert not got.cpu().transpose(1, 2)[masked].any(), f"{name}: a masked key's is not exactly 0"
