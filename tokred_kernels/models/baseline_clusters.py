"""K-Medoids and DPC-KNN in plain PyTorch, as their authors publish them: what the clustering ops are measured against.

Distances are torch.cdist's. As published, each cluster is masked, one after the other, out of a copy of all weighted
distances; a practitioner would take them at once. Ties fall as PyTorch lets them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def eager_kmedoids(
    x: Tensor,
    weight: Tensor,
    k: int,
    prefix: int = 1,
    *,
    update: str = "textbook",
    iterations: int = 3,
    at_once: bool = False,
) -> tuple[Tensor, Tensor]:
    """The prefix and the medoids of k clusters of patches.

    Args:
        x: [B, N, C]; weight: [B, N], what every token is worth, of which the k best patches are the first medoids.
        update: "textbook" or "wttu" (as published), see `tokred_kernels.medoids`.
        at_once: the costs of all clusters in one matrix product, instead of a loop over clusters.

    Returns:
        [B, prefix + k, C], and the cluster of each patch [B, N - prefix].
    """
    patches, weight = x[:, prefix:], weight[:, prefix:]
    distance = torch.cdist(patches, patches)
    weighted = distance * (weight[:, :, None] if update == "wttu" else weight[:, None])
    medoids = weight.topk(k, dim=1).indices
    for _ in range(iterations):
        label = _nearest(distance, medoids)
        medoids = (_moved_at_once if at_once else _moved)(weighted, label, k, update)
    rows = patches.gather(1, medoids[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :prefix], rows], 1), _nearest(distance, medoids)


def _moved(weighted: Tensor, label: Tensor, k: int, update: str) -> Tensor:
    """The new medoids [B, k] of clusters `label` [B, P] by weighted distances [B, P, P]."""
    medoids = label.new_zeros(len(label), k)
    for c in range(k):
        member = label == c
        if update == "wttu":
            cost = weighted.masked_fill(~member[:, :, None], torch.inf).sum(2)
        else:
            cost = weighted.masked_fill(~member[:, None], 0).sum(2).masked_fill(~member, torch.inf)
        medoids[:, c] = cost.argmin(1)
    return medoids


def _moved_at_once(weighted: Tensor, label: Tensor, k: int, update: str) -> Tensor:
    member = F.one_hot(label, k)
    cost = weighted.sum(2, keepdim=True) if update == "wttu" else weighted @ member.to(weighted.dtype)
    return torch.where(member.bool(), cost, torch.inf).argmin(1)


def eager_dpcknn(
    x: Tensor, k: int, prefix: int = 1, *, score: nn.Module | None = None, neighbors: int = 5
) -> tuple[Tensor, Tensor]:
    """The prefix and the weighted means of k clusters of patches around the peaks of density.

    Args:
        x: [B, N, C].
        score: maps [B, P, C] to the logarithm of the weights, [B, P, 1]; None: they are 1.

    Returns:
        As `eager_kmedoids`. The published noise on the densities, which breaks ties, is left out.
    """
    patches = x[:, prefix:]
    B, P, C = patches.shape
    distance = torch.cdist(patches, patches) / C**0.5
    near = distance.topk(neighbors, dim=2, largest=False).values
    density = (-near.square().mean(2)).exp()
    denser = density[:, None] > density[:, :, None]
    farthest = distance.flatten(1).amax(1)[:, None, None]
    delta = torch.where(denser, distance, farthest).amin(2)
    centres = (delta * density).topk(k, dim=1).indices
    label = _nearest(distance, centres)
    label = label.scatter(1, centres, torch.arange(k, device=x.device).expand(B, -1))

    weight = patches.new_ones(B, P, 1) if score is None else score(patches).exp()
    row = (label + k * torch.arange(B, device=x.device)[:, None]).flatten()
    total = patches.new_zeros(B * k, 1).index_add_(0, row, weight.flatten(0, 1)) + 1e-6
    share = weight.flatten(0, 1) / total[row]
    rows = patches.new_zeros(B * k, C).index_add_(0, row, patches.flatten(0, 1) * share)
    return torch.cat([x[:, :prefix], rows.unflatten(0, (B, k))], 1), label


def _nearest(distance: Tensor, centres: Tensor) -> Tensor:
    """[B, P], the nearest of centres [B, k] for each patch."""
    return distance.gather(2, centres[:, None].expand(-1, distance.shape[1], -1)).argmin(2)
