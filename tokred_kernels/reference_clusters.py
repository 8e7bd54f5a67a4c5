"""The specification of the clustering ops in plain PyTorch, as reference.py is of the others."""

import torch
from torch import Tensor

from . import _check
from ._check import wide


def _first(mask: Tensor) -> Tensor:
    """The lowest index of True in the last dimension, 0 if there is none."""
    return mask.to(torch.uint8).argmax(-1)  # ties: of equal values argmax takes the first, of uint8 on all devices


def _lowest(value: Tensor, eligible: Tensor, none: Tensor) -> Tensor:
    """The lowest index of the smallest eligible value of the last dimension; where nothing is eligible, `none`."""
    if value.shape[-1] == 0:
        return none
    best = value.masked_fill(~eligible, torch.inf).amin(-1, keepdim=True)
    return torch.where(eligible.any(-1), _first(eligible & (value == best)).int(), none)


def _ordered(distance: Tensor) -> Tensor:
    """Distances as they are compared: NaN counts as +inf."""
    return wide(distance).masked_fill(distance.isnan(), torch.inf)


def pairwise_distance(x: Tensor, *, scale: float = 1.0) -> Tensor:
    _check.pairwise_distance(x)
    x = wide(x)
    distance = scale * torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0)


def knn(distance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check.knn(distance, k)
    indices = _ordered(distance).sort(dim=2, stable=True).indices[..., :k]
    return wide(distance).gather(2, indices), indices.int()


def separation(distance: Tensor, density: Tensor) -> Tensor:
    _check.separation(distance, density)
    N = distance.shape[1]
    d = _ordered(distance)
    if N == 0:
        return d.new_empty(d.shape[:2])
    rank = density.to(d.dtype)
    rank = rank.masked_fill(rank.isnan(), -torch.inf)
    mine, other, index = rank[:, :, None], rank[:, None], torch.arange(N, device=d.device)
    denser = (other > mine) | ((other == mine) & (index < index[:, None]))
    delta = d.masked_fill(~denser, torch.inf).amin(2)
    largest = wide(distance).masked_fill(~distance.isfinite(), -torch.inf).amax((1, 2))
    return torch.where(denser.any(2), delta, largest[:, None])


def nearest(distance: Tensor, centres: Tensor, *, pin: bool = False) -> Tensor:
    _check.nearest(distance, centres)
    B, N, _ = distance.shape
    K = centres.shape[1]
    label = centres.new_full((B, N), -1)
    if N == 0 or K == 0:
        return label
    real = ((centres >= 0) & (centres < N))[:, None]
    column = torch.where(real, centres[:, None], 0).long()
    label = _lowest(_ordered(distance).gather(2, column.expand(-1, N, -1)), real.expand(-1, N, -1), label)
    if pin:
        own = centres[:, None] == torch.arange(N, device=centres.device)[:, None]
        label = torch.where(own.any(2), _first(own).int(), label)
    return label


def medoids(distance: Tensor, label: Tensor, centres: Tensor, weight: Tensor, *, update: str = "textbook") -> Tensor:
    _check.medoids(distance, label, centres, weight, update)
    K = centres.shape[1]
    d = wide(distance)
    w = weight.to(d.dtype)
    # Summed in float64 and rounded once: rows that are equal tie exactly.
    if update == "textbook":
        together = label[:, :, None] == label[:, None]
        cost = torch.where(together, d * w[:, None], 0).sum(2, dtype=torch.float64).to(d.dtype)
    else:
        cost = w * d.sum(2, dtype=torch.float64).to(d.dtype)
    member = label[:, None] == torch.arange(K, device=label.device)[:, None]  # [B, K, N]
    return _lowest(_ordered(cost)[:, None].expand(-1, K, -1), member, centres.clone())
