"""ToMe: merge the r most similar patches in every block, between attention and MLP."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import schedule
from ._method import Method


@dataclass(frozen=True)
class ToMe(Method):
    """Token merging, for any trained model, without training.

    In every block, after attention, each of the r patches at even positions with the best edges merges into its most
    similar patch at odd positions. Similarity is the cosine of the keys, averaged over the heads, after k-norm where
    the model has one. A merged token is the size-weighted mean of its members, and attention counts it as often as it
    has members:

        softmax(q k^T D^-1/2 + log size) v

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.

    Options:
        r: patches to merge: an int, the same for every block; (int, inflection); or a list of ints, one a block. See
            `tokred_kernels.schedule.removals`. At most half of a block's patches merge.
        prop_attn: attention counts sizes. False for models trained without it, such as off-the-shelf MAE.

    Raises:
        ValueError: r is negative or malformed, or its inflection is outside [-1, 1].
    """

    r: schedule.Removal
    prop_attn: bool = True

    sized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", schedule.plain(self.r))
        if min(schedule.removals(self.r, 1), default=0) < 0:
            raise ValueError(f"tome: r must be at least 0, got {self.r!r}")
        if not isinstance(self.prop_attn, bool):
            raise ValueError(f"tome: prop_attn must be True or False, got {self.prop_attn!r}")

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        return schedule.removals(self.r, depth)

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        return schedule.merged(self.schedule(depth, patches)[:depth], patches, prefix)

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        q, k, v = block.project(x)
        assign = None
        # Where r is known, r = 0 costs nothing; a graph compiled for any r keeps the ops, then the identity.
        reduces = not statically_known_true(r == 0)
        if reduces:
            # Before the attention, while the keys are in the cache: on a CPU that is worth more than merging in the
            # same pass, 1 to 2 % of the model.
            assign = torch.ops.tokred.match(k, r, block.tokred_prefix)
        x = x + block.attend(q, k, v, size if self.prop_attn else None)[0]
        if reduces:
            N = x.shape[1]
            x, size = torch.ops.tokred.merge(x, assign, N - max(0, min(r, (N - block.tokred_prefix) // 2)), size)
        return x + block.feed_forward(x), size, assign
