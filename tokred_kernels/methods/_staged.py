"""Methods that reduce in a few blocks, their stages, to a number of patches known before the forward."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .. import schedule
from ._method import Assign, Method


@dataclass(frozen=True)
class Staged(Method):
    """Options of every method with stages.

    Options:
        keep_rate: share of the patches to keep, in (0, 1], or a list, one a stage. 1 throughout: the unpatched model.
        stages: the blocks that reduce, from 0, ascending.
        rule: "wttu": floor(keep_rate^(i + 1) P0) in stage i, at least 1, P0 the patches that reach block 0; of a list,
            floor(keep_rate_i P0). "evit": ceil(keep_rate P), P the patches that reach the stage.
            See `tokred_kernels.schedule.ratios`.
        tokens: instead of keep_rate, how many patches to keep: a list, one entry a stage, or one a block.

    Raises:
        ValueError: an option is malformed; the model has no such block.
    """

    keep_rate: float | Sequence[float] | None = None
    stages: Sequence[int] = (3, 6, 9)
    rule: str = "wttu"
    tokens: Sequence[int] | None = None

    site: ClassVar[str] = "middle"  # where in its stage a method reduces: a key of schedule.SITES

    def __post_init__(self) -> None:
        stages = self._integers("stages", self.stages, 0)
        if any(a >= b for a, b in itertools.pairwise(stages)):
            self._refuse("stages must be ascending", self.stages)
        if (self.keep_rate is None) == (self.tokens is None):
            raise ValueError(f"{self._name()}: give either keep_rate= or tokens=")
        if self.rule not in schedule.RULES:
            self._refuse(f"rule must be one of {', '.join(schedule.RULES)}", self.rule)
        try:
            share = None if self.keep_rate is None else schedule.ratios(self.keep_rate, len(stages), self.rule)
        except ValueError as error:
            raise ValueError(f"{self._name()}: {error}") from None
        tokens = None if self.tokens is None else self._integers("tokens", self.tokens, 1)
        if tokens is not None and len(tokens) != len(stages):
            stages = tuple(range(len(tokens)))
        object.__setattr__(self, "_plan", (stages, share, tokens))

    def check(self, model: nn.Module) -> None:
        stages, _, tokens = self._plan
        depth = len(model.blocks)
        if tokens is not None and len(tokens) not in (len(self.stages), depth):
            self._refuse(f"tokens must have one entry a stage, {len(self.stages)}, or a block, {depth}", self.tokens)
        if stages and stages[-1] >= depth:
            self._refuse(f"stages must be below {depth}, the number of blocks", self.stages)

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        stages, share, tokens = self._plan
        return schedule.unkept(depth, patches, stages, share, tokens, rule=self.rule, fuse=self.fuses)

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        return schedule.selected(self.schedule(depth, patches), patches, prefix, self.fuses, self.site)

    def may_reduce(self, block: int) -> bool:
        """Whether there is a number of patches of which this block keeps fewer: whether it needs a learned part."""
        stages, share, _ = self._plan
        return block in stages and (share is None or share[stages.index(block)] != (1, 1))


class BeforeBlock(Staged):
    """Reduces the tokens that enter a stage's block; the whole block runs on what is left."""

    site: ClassVar[str] = "before"

    def reduce(self, block, x: Tensor, size: Tensor | None, keep: int) -> tuple[Tensor, Tensor | None, Assign]:
        """x [B, N, C] to its prefix and `keep` patches: the new x, sizes and assign [B, N]."""
        raise NotImplementedError

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Assign | None]:
        assign = None
        if r != 0:
            x, size, assign = self.reduce(block, x, size, x.shape[1] - block.tokred_prefix - r)
        x = x + block.attend(*block.project(x), size)[0]
        return x + block.feed_forward(x), size, assign
