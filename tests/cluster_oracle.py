"""A brute-force oracle of the clustering ops in float64, written apart from the reference, and the checks against it.

What only compares must be exact. Distances, and the costs that choose a medoid, must be within the rounding of their
sums; members with equal rows and weights must tie exactly.
"""

import math

import numpy as np
import torch
from oracle import FLOAT32_MAX, check_values, same
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t.cpu() if t.dtype == torch.float64 else t.cpu().float()


def _array(t: Tensor) -> np.ndarray:
    return t.double().cpu().numpy()


def check_pairwise(out: Tensor, x: Tensor, scale: float) -> None:
    """A square is rounded three times; C of them are added in chunks, or lanes, of at most 64 + C / 64."""
    assert out.dtype == _wide(x).dtype and out.is_contiguous()
    B, N, C = x.shape
    assert out.shape == (B, N, N)
    out = out.cpu()
    assert B == 0 or same(out, out.transpose(1, 2))
    assert not out.diagonal(dim1=1, dim2=2).any()
    single = out.dtype == torch.float32
    unit, least = (2.0**-23, 2.0**-149) if single else (2.0**-52, 2.0**-1074)
    with np.errstate(all="ignore"):
        difference = _array(x)[:, :, None] - _array(x)[:, None]
        squares = (difference**2).sum(-1)
        want = np.sqrt(squares) * scale
        if single:
            want[squares > FLOAT32_MAX] = np.inf
        want[:, np.arange(N), np.arange(N)] = 0
        slack = unit * (min(C, 64 + C / 64) / 2 + 5) * np.abs(want) + scale * math.sqrt(least * C)
    slack[~np.isfinite(want)] = 0
    check_values(out, torch.from_numpy(want), torch.from_numpy(slack))


def check_knn(got: tuple[Tensor, Tensor], distance: Tensor, k: int) -> None:
    values, indices = got
    B, N, _ = distance.shape
    k = min(k, N)
    assert values.shape == indices.shape == (B, N, k) and indices.dtype == torch.int32
    assert values.is_contiguous() and indices.is_contiguous()
    d = _array(distance)
    for b in range(B):
        for i in range(N):
            key = np.where(np.isnan(d[b, i]), np.inf, d[b, i]).tolist()
            assert indices[b, i].tolist() == sorted(range(N), key=lambda j: (key[j], j))[:k]
    assert same(values.cpu(), _wide(distance).gather(2, indices.cpu().long())), "neighbours are exact copies"


def check_separation(out: Tensor, distance: Tensor, density: Tensor) -> None:
    B, N = density.shape
    assert out.shape == (B, N) and out.dtype == _wide(distance).dtype and out.is_contiguous()
    d, rho = _array(distance), _array(_wide(density).to(out.dtype))
    want = np.empty((B, N))
    for b in range(B):
        key = np.where(np.isnan(rho[b]), -np.inf, rho[b])
        falling = sorted(range(N), key=lambda i: (-key[i], i))
        for n, i in enumerate(falling):
            row = d[b, i, falling[:n]]
            want[b, i] = np.where(np.isnan(row), np.inf, row).min(initial=np.inf)
        if N:
            want[b, falling[0]] = d[b][np.isfinite(d[b])].max(initial=-np.inf)
    assert torch.equal(out.cpu().double(), torch.from_numpy(want))


def check_nearest(label: Tensor, distance: Tensor, centres: Tensor, pin: bool) -> None:
    B, N, _ = distance.shape
    assert label.shape == (B, N) and label.dtype == torch.int32 and label.is_contiguous()
    d, c = _array(distance), centres.cpu().tolist()
    for b in range(B):
        want = []
        for i in range(N):
            key = np.where(np.isnan(d[b, i]), np.inf, d[b, i]).tolist()
            real = [n for n, centre in enumerate(c[b]) if 0 <= centre < N]
            own = [n for n in real if pin and c[b][n] == i]
            want.append(own[0] if own else min(real, key=lambda n: (key[c[b][n]], n), default=-1))
        assert label[b].tolist() == want


def check_medoids(out: Tensor, distance: Tensor, label: Tensor, centres: Tensor, weight: Tensor, update: str) -> int:
    """Returns how many clusters of more than one member float64 decides clearly."""
    B, K = centres.shape
    assert out.shape == (B, K) and out.dtype == torch.int32 and out.is_contiguous()
    wide = _wide(distance).dtype
    unit = 2.0**-52 if wide == torch.float64 else 2.0**-23
    d, w, limit = _array(distance), _array(_wide(weight).to(wide)), torch.finfo(wide).max
    clear = 0
    for b in range(B):
        for c in range(K):
            members = np.flatnonzero(label[b].cpu().numpy() == c)
            got = int(out[b, c])
            if len(members) == 0:
                assert got == int(centres[b, c])
                continue
            with np.errstate(all="ignore"):
                if update == "textbook":
                    terms = d[b][np.ix_(members, members)] * w[b, members]
                else:
                    terms = d[b][members] * w[b, members, None]
                terms[np.abs(terms) > limit] *= np.inf  # what a product of the wide type becomes
                cost = terms.sum(1)
                slack = 2 * unit * np.abs(terms).sum(1) + 2.0**-148 * len(members)
            if update == "wttu" and not np.isfinite(_total(d[b], members, wide) * w[b, members]).all():
                cost = _total(d[b], members, wide) * w[b, members]  # the sum is rounded before the product
                slack = np.where(np.isfinite(cost), slack, 0)
            cost = np.where(np.isnan(cost) | (cost > limit), np.inf, cost)
            cost = np.where(cost < -limit, -np.inf, cost)
            slack = np.where(np.isfinite(cost), np.nan_to_num(slack), 0)
            best = cost.argmin()  # the first of equal ones
            near = [
                n
                for n in range(len(members))
                if cost[n] == cost[best] or cost[n] - slack[n] <= cost[best] + slack[best]
            ]
            rows = np.concatenate([terms, cost[:, None]], 1)[near]
            if len(near) == 1 or all(np.array_equal(rows[0], r, equal_nan=True) for r in rows):
                clear += len(members) > 1
                assert got == members[near[0]]
            else:
                assert got in members[near]
    return clear


def _total(d: np.ndarray, members: np.ndarray, wide: torch.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        return torch.from_numpy(d[members].sum(1)).to(wide).double().numpy()
