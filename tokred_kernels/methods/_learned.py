"""What methods with learned parts share: how they start, and clusters of which there is a parameter each."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schedule
from ._clusters import to_assign
from ._method import Assign
from ._staged import BeforeBlock


def initialised(part: nn.Module) -> nn.Module:
    """The part with its linear layers as DeiT starts them, N(0, 0.02^2) cut off at 2, and biases of 0."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return part


def over_patches(logits: Tensor) -> Tensor:
    """softmax over the last dimension, in at least float32.

    Weights below the normal numbers are 0: they add nothing, and a CPU multiplies them 25 times slower.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.threshold(logits.softmax(-1, dtype=wide), torch.finfo(wide).tiny, 0.0)


@dataclass(frozen=True)
class Soft(BeforeBlock):
    """Methods whose clusters are weighted sums of all patches, with learned weights W [B, M, P].

    The counts are those of the options for the patches of the model's own resolution, where it has M clusters in a
    stage; a stage that would keep all of them has no clusters and no parameters. At another resolution the clusters are
    the same, and a stage that no more than M patches reach leaves them alone.
    """

    def check(self, model: nn.Module) -> None:
        super().check(model)
        patches = model.patch_embed.num_patches
        clusters = {}
        for block, r in enumerate(super().schedule(len(model.blocks), patches)):
            patches -= r
            if r > 0:
                clusters[block] = patches
        object.__setattr__(self, "_clusters", clusters)

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        return schedule.unkept(depth, patches, tuple(self._clusters), None, tuple(self._clusters.values()))

    def part(self, model: nn.Module, block: int) -> nn.Module | None:
        if block not in self._clusters:
            return None
        return initialised(self.weighting(model.embed_dim, self._clusters[block]))

    def weighting(self, width: int, clusters: int) -> nn.Module:
        """The learned module: patches [B, P, C] to clusters [B, M, C] and W [B, M, P]."""
        raise NotImplementedError

    def reduce(self, block, x: Tensor, size: Tensor | None, keep: int) -> tuple[Tensor, Tensor | None, Assign]:
        prefix = block.tokred_prefix
        rows, W = block.tokred_part(x[:, prefix:])
        return torch.cat([x[:, :prefix], rows.to(x.dtype)], 1), size, lambda: to_assign(W.argmax(1), prefix)
