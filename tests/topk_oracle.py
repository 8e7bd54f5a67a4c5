"""A brute-force oracle of topk and topk_gather in plain Python and float64, and the checks that compare with it.

The selection and the kept rows must be exact; the fused row must be within the rounding of a float32 accumulation.
"""

import math

import numpy as np
import torch
from oracle import check_values, same
from torch import Tensor


def assign_of(score: list[float], k: int, p: int, fuse: bool) -> list[int]:
    """One image, by the order rule: a higher score first, then the lower index; NaN counts as -inf."""
    value = [-math.inf if math.isnan(s) else s for s in score]
    N = len(score)
    if k >= N - p:
        return list(range(N))
    kept = set(sorted(range(p, N), key=lambda i: (-value[i], i))[:k])
    rows = iter(range(p, p + k))
    return [i if i < p else next(rows) if i in kept else p + k if fuse else -1 for i in range(N)]


def check_assign(assign: Tensor, score: Tensor, k: int, p: int, fuse: bool) -> None:
    """score [B, N] as the op reads it."""
    assert assign.dtype == torch.int32 and assign.is_contiguous()
    want = [assign_of(row, k, p, fuse) for row in score.double().cpu().tolist()]
    assert torch.equal(assign.cpu(), torch.tensor(want, dtype=torch.int32).reshape(score.shape))


def fused_row(x: np.ndarray, w: np.ndarray, fuse: str, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """(sum w x, or the mean; a bound on its rounding) of the members x [n, C], in float64."""
    if fuse == "mean" and len(w) == 1:
        return x[0], np.zeros_like(x[0])
    with np.errstate(all="ignore"):
        if fuse == "mean" and w.sum() == 0:
            w = np.ones_like(w)
        total = w.sum() if fuse == "mean" else 1.0
        out = (w[:, None] * x).sum(0) / total
        mass = np.abs(w[:, None] * x).sum(0) + (np.abs(out) * np.abs(w).sum() if fuse == "mean" else 0)
        least = 2.0**-149 if unit > 2.0**-50 else 2.0**-1074  # of a product that is denormal
        slack = (len(w) + 2) * (unit * mass + least) / abs(total)
        if fuse == "mean" and abs(total) < 1e-3 * np.abs(w).sum():  # rounding decides the quotient
            return out, np.full_like(slack, np.inf)
    return out, np.where(np.isfinite(slack), slack, 0)


def check_gather(got: tuple[Tensor, Tensor], x: Tensor, score: Tensor, k: int, p: int, fuse: str) -> None:
    """Asserts everything about the result of topk_gather."""
    out, assign = got
    x, wide = x.cpu(), torch.float64 if x.dtype == torch.float64 else torch.float32
    B, N, C = x.shape
    score = score.cpu().to(wide)
    check_assign(assign, score, k, p, fuse != "none")
    assert out.dtype == x.dtype and out.is_contiguous()
    assert out.shape == (B, min(N, p + k + (fuse != "none")), C)
    fused = fuse != "none" and k < N - p
    for b in range(B):
        rows, here = assign[b].cpu().long(), out[b].cpu()
        kept = (rows >= 0) & ((rows < p + k) | (not fused))
        assert same(here[rows[kept]], x[b, kept]), "kept rows are exact copies"
        if not fused:
            continue
        members = x[b, ~kept]
        unit = 2.0**-52 if wide == torch.float64 else 2.0**-23
        want, slack = fused_row(members.double().numpy(), score[b, ~kept].double().numpy(), fuse, unit)
        check_values(here[p + k], torch.from_numpy(want), torch.from_numpy(slack))
        if fuse == "mean" and len(members) == 1:
            assert same(here[p + k], members[0]), "a token alone in a mean is an exact copy"
