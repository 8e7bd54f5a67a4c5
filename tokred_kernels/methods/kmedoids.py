"""K-Medoids: a few patches stand for all, chosen by clustering."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import schedule
from ._clusters import farthest_first, ranked, to_assign
from ._staged import Staged

UPDATES = ("textbook", "wttu")


@dataclass(frozen=True)
class KMedoids(Staged):
    """Clusters of patches, each replaced by its medoid, for any trained model, without training.

    Before each stage, with w the column mean of the attention in the block before (its class token's row included) and
    d the distances of the patches that leave that block:

        m = the M patches with the highest w, in that order
        iterations times:   each patch joins its nearest m_c,   then
            m_c = argmin over i in c of   sum over j in c of w_j d_ij     ("textbook")
                                          w_i sum over all j of d_ij      ("wttu", as published: not k-medoids, its
                                          weight favours patches that nobody attends to)
        each patch joins its nearest m_c;   y_c = x_{m_c}

    The medoid's own features replace its cluster, not an average. A cluster that loses all members keeps its medoid;
    in the published code it gets patch 0. Of equals the lower index comes first. The choice has no gradient.
    The step runs where the attention is at hand: at the end of the block before the stage.
    Source: Marin et al., "Token Pooling in Vision Transformers", 2021, as in Haurum et al., "Which Tokens to Use?",
    ICCVW 2023.

    Options: those of `tokred_kernels.methods.Staged`, with stages from block 1, and
        update: "textbook" or "wttu".
        iterations: at least 0.
        equal_weight: w = 1, and m starts with the patch of the smallest sum of distances, followed by the one farthest
            from all chosen so far. (The published code starts with a random patch, the same for the whole batch, and
            continues with the one farthest from any.)

    Raises:
        ValueError: an option is malformed; the model has no such block.
    """

    update: str = "textbook"
    iterations: int = 3
    equal_weight: bool = False

    site: ClassVar[str] = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._plan[0][:1] == (0,):
            self._refuse("stages must be from 1, as the weights are the attention of the block before", self._plan[0])
        if self.update not in UPDATES:
            self._refuse(f"update must be one of {', '.join(UPDATES)}", self.update)
        self._integer("iterations", self.iterations, 0)
        if not isinstance(self.equal_weight, bool):
            self._refuse("equal_weight must be True or False", self.equal_weight)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if not self.equal_weight:
            self._check_heads(model)

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        stages, share, tokens = self._plan
        return schedule.unkept(depth, patches, [stage - 1 for stage in stages], share, tokens, rule=self.rule)

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scores = "none" if r == 0 or self.equal_weight else "mean"
        branch, weight = block.attend(*block.project(x), scores=scores)
        x = x + branch
        x = x + block.feed_forward(x)
        if r == 0:
            return x, size, None
        prefix = block.tokred_prefix
        weight = x.new_ones(x.shape[:2]) if weight is None else weight
        centres, label = self.cluster(x[:, prefix:], weight[:, prefix:], x.shape[1] - prefix - r)
        return torch.ops.tokred.unmerge(x, to_assign(centres, prefix)), size, to_assign(label, prefix)

    def cluster(self, x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The medoids [B, k] of patches x [B, P, C] with weights [B, P], and the cluster [B, P] of each patch."""
        distance = torch.ops.tokred.pairwise_distance(x)
        centres = farthest_first(distance, k) if self.equal_weight else ranked(weight, k)
        for _ in range(self.iterations):
            label = torch.ops.tokred.nearest(distance, centres)
            centres = torch.ops.tokred.medoids(distance, label, centres, weight, update=self.update)
        return centres, torch.ops.tokred.nearest(distance, centres)
