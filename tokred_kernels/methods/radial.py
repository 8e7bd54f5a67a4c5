"""Radial: keep the patches nearest to the centre of the image, whatever it shows."""

import itertools
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._staged import BeforeBlock

# Of patch (i, j), a = 2 i - (rows - 1) and b = 2 j - (columns - 1) from the centre, in half patches. l2 is squared:
# equal distances must be equal integers, or rounding splits rings.
METRICS = {
    "l1": lambda a, b: abs(a) + abs(b),
    "l2": lambda a, b: a * a + b * b,
    "linf": lambda a, b: max(abs(a), abs(b)),
}
MODES = ("drop", "mask")


@dataclass(frozen=True)
class Radial(BeforeBlock):
    """A pattern that is the same for every image: the baseline that a method which looks must beat.

    A stage keeps whole rings around the centre: the patches with distance <= d, with the d whose count is closest to
    the stage's count (of two, the smaller d). 14 x 14 patches at a keep rate of 0.7 leave 140, 96, 68 (l2).

    The published contiguous mode, whose radius shrinks in every block from the corner's to the centre's, is a list of
    tokens: on 14 x 14 patches with l2, stages=range(3, 10), tokens=[184, 156, 112, 80, 52, 24, 12].
    Source: Haurum et al., "Which Tokens to Use?", ICCVW 2023 (fixed radial patterns).

    Options: those of `tokred_kernels.methods.Staged`, whose counts are those before the rounding to rings, and
        metric: "l1", "l2" or "linf".
        mode: "drop" removes the other patches before the stage's block. "mask" leaves them in, as published, as tokens
            of size 0 that no attention looks at; what the model says is the same, but nothing is faster.

    Raises:
        ValueError: an option is malformed; the model has no such block, no fixed grid, or drops patches in training.
    """

    metric: str = "l2"
    mode: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            self._refuse(f"metric must be one of {', '.join(METRICS)}", self.metric)
        if self.mode not in MODES:
            self._refuse(f"mode must be one of {', '.join(MODES)}", self.mode)

    @property
    def sized(self) -> bool:
        return self.mode == "mask"

    masks = sized

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if model.dynamic_img_size:
            raise ValueError("radial: rings need a fixed grid, and the model takes images of any size")
        if not isinstance(model.patch_drop, nn.Identity):
            raise ValueError("radial: rings need the whole grid, and the model drops patches in training")
        rows, columns = model.patch_embed.grid_size
        metric = METRICS[self.metric]
        distance = [metric(2 * i - rows + 1, 2 * j - columns + 1) for i in range(rows) for j in range(columns)]
        ordered = sorted(distance)
        rings = {bisect_right(ordered, d): d for d in ordered}  # patches within a distance, ascending: the distance
        left, radii = len(distance), []
        for r in super().schedule(len(model.blocks), len(distance)):
            left -= r
            radii.append(rings[min(rings, key=lambda count: abs(count - left))])
        # How far out each patch is; the radius before the first block and in each; the patches within those.
        radii = (ordered[-1], *radii)
        object.__setattr__(self, "_rings", (distance, radii, tuple(bisect_right(ordered, d) for d in radii)))

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        kept = self._rings[2]
        if patches != kept[0]:
            raise ValueError(f"radial: applied to a grid of {kept[0]} patches, got {patches}; remove() it first")
        return tuple(before - after for before, after in itertools.pairwise(kept))

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        return [(prefix + patches,) * 2] * depth if self.masks else super().counts(depth, patches, prefix)

    def part(self, model: nn.Module, block: int) -> nn.Module | None:
        distance, radii, _ = self._rings
        before, radius = radii[block : block + 2]
        if before == radius:
            return None
        reach = [d for d in distance if d <= before or self.masks]
        return Ring(model.num_prefix_tokens, [d <= radius for d in reach], self.masks)

    def reduce(self, block, x: Tensor, size: Tensor | None, keep: int) -> tuple[Tensor, Tensor | None, Tensor]:
        ring = block.tokred_part
        assign = ring.assign.expand(x.shape[0], -1)
        if self.masks:
            return x, (assign >= 0).float(), assign
        return x.index_select(1, ring.kept), size, assign


class Ring(nn.Module):
    """Which tokens of a block are kept. Buffers, so that they move with the model; not in its state dict."""

    def __init__(self, prefix: int, inside: list[bool], masks: bool) -> None:
        super().__init__()
        kept = [token for token, stays in enumerate([True] * prefix + inside) if stays]
        assign = torch.full((prefix + len(inside),), -1, dtype=torch.int32)
        assign[kept] = torch.tensor(kept, dtype=torch.int32) if masks else torch.arange(len(kept), dtype=torch.int32)
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        self.register_buffer("assign", assign, persistent=False)
