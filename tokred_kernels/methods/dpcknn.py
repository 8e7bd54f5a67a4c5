"""DPC-KNN: patches gather around the peaks of their density."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._clusters import ranked, to_assign
from ._learned import initialised
from ._staged import BeforeBlock


@dataclass(frozen=True)
class DPCKNN(BeforeBlock):
    """Density-peak clusters of patches; with equal weights for any trained model.

    Before each stage, the P patches become M clusters around those that are dense and far from what is denser:

        d_ij = |x_i - x_j| C^-1/2,   rho_i = exp(-mean of d_ij^2 over the k nearest j, i among them)
        delta_i = min d_ij over the denser j;   the largest d of the image for the densest
        centres: the M patches with the highest rho delta;   every patch goes to the nearest centre, a centre to itself
        y_c = sum_i t_i x_i / sum_i t_i over cluster c,   t = exp(Linear(x)) learned, or 1

    Rows follow the rank of their centres. Of equal densities, scores or distances the lower index comes first, so that
    results are deterministic; the published code breaks ties by noise, which makes every inference another. It also
    adds 1e-6 to sum t, and lets exp overflow: here t is exp in float32, divided by its largest value in the image. A
    cluster of one is an exact copy. No gradient flows through the choice of clusters; x and t have theirs.
    State, unless equal_weight: blocks.{l}.tokred_part.score.{weight [1, C], bias [1]}; published checkpoints call the
    part of stage i cluster_layers.{i}.
    Source: Zeng et al., "Not All Tokens Are Equal" (TCFormer), CVPR 2022, as in Haurum et al., "Which Tokens to Use?",
    ICCVW 2023.

    Options: those of `tokred_kernels.methods.Staged`, and
        k_neighbors: k, at least 1; where there are fewer patches, all of them.
        equal_weight: t = 1, and nothing is learned.

    Raises:
        ValueError: an option is malformed; the model has no such block.
    """

    k_neighbors: int = 5
    equal_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer("k_neighbors", self.k_neighbors, 1)
        if not isinstance(self.equal_weight, bool):
            self._refuse("equal_weight must be True or False", self.equal_weight)

    def part(self, model: nn.Module, block: int) -> nn.Module | None:
        if self.equal_weight or not self.may_reduce(block):
            return None
        return initialised(nn.ModuleDict({"score": nn.Linear(model.embed_dim, 1)}))

    def reduce(self, block, x: Tensor, size: Tensor | None, keep: int) -> tuple[Tensor, Tensor | None, Tensor]:
        prefix = block.tokred_prefix
        patches = x[:, prefix:]
        distance = torch.ops.tokred.pairwise_distance(patches, scale=x.shape[2] ** -0.5)
        near = torch.ops.tokred.knn(distance, self.k_neighbors)[0]
        density = (-near.square().mean(2)).exp()
        centres = ranked(density * torch.ops.tokred.separation(distance, density), keep)
        assign = to_assign(torch.ops.tokred.nearest(distance, centres, pin=True), prefix)
        weight = None
        if not self.equal_weight:
            score = block.tokred_part["score"](x).squeeze(2)[:, prefix:].to(distance.dtype)  # of patches alone: a copy
            weight = F.pad((score - score.detach().amax(1, keepdim=True)).exp(), (prefix, 0), value=1.0)
        x = torch.ops.tokred.merge(x, assign, prefix + keep, weight=weight)[0]
        return x, size, assign
