"""Top-K: in a few blocks, keep the patches that the class token attends to most, and drop the others."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import _check, schedule


@dataclass(frozen=True)
class TopK:
    """Selection by attention, for any trained model; it gains from fine-tuning.

    In each stage, between attention and MLP, the k patches with the best scores stay, in their order. The score of a
    patch is what the class token attends to it with in this very block, averaged over the heads:

        score_j = 1/H sum_h softmax(q k^T D^-1/2)_h0j

    Tokens have no sizes: average pooling is a plain mean of what is left.
    Source: Haurum et al., "Which Tokens to Use?", ICCVW 2023 (Top-K).

    Options:
        keep_rate: share of the patches to keep, in (0, 1], or a list, one a stage. 1 throughout: the unpatched model.
        stages: the blocks that reduce, from 0, ascending.
        rule: "wttu": floor(keep_rate^(i + 1) P0) in stage i, at least 1, P0 the patches that reach block 0; of a list,
            floor(keep_rate_i P0). "evit": ceil(keep_rate P), P the patches that reach the stage.
            See `tokred_kernels.schedule.ratios`.
        tokens: instead of keep_rate, how many patches to keep: a list, one entry a stage, or one a block.
        scores: "cls", or "mean", the column mean of the attention matrix, for models without a class token.

    Raises:
        ValueError: an option is malformed; the model has no such block, or no class token.
    """

    keep_rate: float | Sequence[float] | None = None
    stages: Sequence[int] = (3, 6, 9)
    rule: str = "wttu"
    tokens: Sequence[int] | None = None
    scores: str = "cls"

    sized: ClassVar[bool] = False

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
        if self.scores not in ("cls", "mean"):
            self._refuse('scores must be "cls" or "mean"', self.scores)
        object.__setattr__(self, "_plan", (stages, share, tokens))

    @property
    def fusion(self) -> str:
        """`fuse` of topk_gather."""
        return "none"

    @property
    def fuses(self) -> bool:
        return self.fusion != "none"

    def check(self, model: nn.Module) -> None:
        stages, _, tokens = self._plan
        depth = len(model.blocks)
        if tokens is not None and len(tokens) not in (len(self.stages), depth):
            self._refuse(f"tokens must have one entry a stage, {len(self.stages)}, or a block, {depth}", self.tokens)
        if stages and stages[-1] >= depth:
            self._refuse(f"stages must be below {depth}, the number of blocks", self.stages)
        if self.scores == "cls" and not model.has_class_token:
            raise ValueError(f'{self._name()}: the model has no class token to score by; use scores="mean"')
        for block in model.blocks:
            if block.attn.head_dim > _check.MAX_WIDTH:
                raise ValueError(
                    f"{self._name()}: scores need heads of width {_check.MAX_WIDTH} at most, got {block.attn.head_dim}"
                )

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        stages, share, tokens = self._plan
        return schedule.unkept(depth, patches, stages, share, tokens, rule=self.rule, fuse=self.fuses)

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        return schedule.selected(self.schedule(depth, patches), patches, prefix, self.fuses)

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assign = None
        if r == 0:
            x = x + block.attend(*block.project(x))[0]
        else:
            branch, scores = block.attend(*block.project(x), scores=self.scores)
            x = x + branch
            prefix = block.tokred_prefix
            x, assign = torch.ops.tokred.topk_gather(x, scores, x.shape[1] - prefix - r, prefix, fuse=self.fusion)
        return x + block.feed_forward(x), size, assign

    def _name(self) -> str:
        return type(self).__name__.lower()

    def _refuse(self, expected: str, got: object) -> None:
        raise ValueError(f"{self._name()}: {expected}, got {got!r}")

    def _integers(self, option: str, values: object, least: int) -> tuple[int, ...]:
        try:
            found = tuple(operator.index(value) for value in values)
        except TypeError:
            found = None
        if found is None or any(isinstance(value, bool) or value < least for value in values):
            self._refuse(f"{option} must be a list of ints of at least {least}", values)
        return found
