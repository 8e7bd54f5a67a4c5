"""medoids: moves the centre of every cluster to its best member. Kernels: medoids in csrc/cpu and triton."""

import torch
from torch import Tensor

from .. import _check
from .._vmap import BatchFold


def medoids(distance: Tensor, label: Tensor, centres: Tensor, weight: Tensor, *, update: str = "textbook") -> Tensor:
    """The member of each cluster that has the lowest cost.

        textbook: cost_i = sum over j of the cluster of i of weight_j distance_ij
        wttu:     cost_i = weight_i sum over all j of distance_ij

    "wttu" is the update of Haurum et al., "Which Tokens to Use?", ICCVW 2023, as published in code: its weight favours
    tokens of low weight and its sum looks beyond the cluster.

    Args:
        distance: [B, N, N], floating, need not be symmetric.
        label: [B, N] int32, the cluster of each token; outside [0, K): in none (TOKRED_DEBUG=1 makes such values other
            than -1 an error).
        centres: [B, K] int32, what a cluster without members keeps.
        weight: [B, N], any floating dtype, read as float32 (float64 if distance is).
        update: "textbook" or "wttu".

    Returns:
        centres [B, K] int32.

    Order: a lower cost first, then the lower index; -0 ties with +0, NaN counts as +inf. Products are float32 (float64
    if distance is), their sum is float64 and rounded to that, so that members with equal rows and weights tie. No
    gradient.

    Raises:
        RuntimeError: wrong rank, dtype, device, layout or shape, unknown update.
    """
    return torch.ops.tokred.medoids(distance, label, centres, weight, update=update)


@torch.library.register_fake("tokred::medoids")
def _fake(distance, label, centres, weight, *, update="textbook"):
    _check.medoids(distance, label, centres, weight, update)
    return centres.new_empty(centres.shape)


@torch.library.register_vmap("tokred::medoids")
def _vmap(info, in_dims, distance, label, centres, weight, *, update="textbook"):
    fold = BatchFold(info, in_dims)
    folded = fold(distance, 0), fold(label, 1), fold(centres, 2), fold(weight, 3)
    return fold.back(medoids(*folded, update=update)), 0
