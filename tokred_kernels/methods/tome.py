"""ToMe: merge the r most similar patches in every block, between attention and MLP."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import schedule
from ..models._joint import JointProjection
from ..trace import compose
from ._staged import Staged


@dataclass(frozen=True)
class ToMe(Staged):
    """Token merging, for any trained model, without training.

    In every block, after attention, each of the r patches at even positions with the best edges merges into its most
    similar patch at odd positions. Similarity is the cosine of the keys, averaged over the heads, after k-norm where
    the model has one. A merged token is the size-weighted mean of its members, and attention counts it as often as it
    has members:

        softmax(q k^T D^-1/2 + log size) v

    With keep_rate or tokens it merges in a few stages, down to their counts. Where more than half of the patches have
    to go, it takes several rounds, each over what the one before left, with merged keys.

    metric="projected" gets the head mean of the keys from the qkv projection itself, as D more columns, so that
    matching does not read the keys:

        m_n = round(mean_h W_k,h) LayerNorm(x)_n + round(mean_h b_k,h)

    with the mean in head order in float32 (float64 for float64 weights), rounded to the dtype of the weights, and m to
    that of the product. It is a result of its own: the keys of an image are so alike that in bfloat16 this rounding
    chooses other pairs. For inference; the larger weights are kept beside the model's, see
    `tokred_kernels.models._joint.JointProjection`.
    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023; Haurum et al., "Which Tokens to Use?", ICCVW
    2023 (stages, where the published code stops at half).

    Options:
        r: patches to merge: an int, the same for every block; (int, inflection); or a list of ints, one a block. See
            `tokred_kernels.schedule.removals`. At most half of a block's patches merge.
        keep_rate, stages, rule, tokens: instead of r, those of `tokred_kernels.methods.Staged`.
        prop_attn: attention counts sizes. False for models trained without it, such as off-the-shelf MAE.
        metric: "keys" or "projected".

    Raises:
        ValueError: r is negative or malformed, or its inflection is outside [-1, 1]; or as Staged; not one of r,
            keep_rate and tokens. With metric="projected": a model that normalises its keys, or whose queries, keys and
            values are no plain linear layer; and training.
    """

    r: schedule.Removal | None = None
    prop_attn: bool = True
    metric: str = "keys"

    sized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if sum(option is not None for option in (self.r, self.keep_rate, self.tokens)) != 1:
            raise ValueError("tome: give one of r=, keep_rate= and tokens=")
        if not isinstance(self.prop_attn, bool):
            self._refuse("prop_attn must be True or False", self.prop_attn)
        if self.metric not in ("keys", "projected"):
            self._refuse('metric must be "keys" or "projected"', self.metric)
        if self.r is None:
            super().__post_init__()
            return
        if self.stages != ToMe.stages or self.rule != ToMe.rule:
            raise ValueError(
                "tome: stages= and rule= go with keep_rate= and tokens=; r= may be a list, one int a block"
            )
        object.__setattr__(self, "r", schedule.plain(self.r))
        if min(schedule.removals(self.r, 1), default=0) < 0:
            self._refuse("r must be at least 0", self.r)

    def check(self, model: nn.Module) -> None:
        if self.r is None:
            super().check(model)
        for block in model.blocks if self.metric == "projected" else ():
            if type(block.attn.qkv) is not nn.Linear or type(block.attn.k_norm) is not nn.Identity:
                raise ValueError(
                    'tome: metric="projected" needs keys straight from an nn.Linear, and no norm of queries and keys'
                )

    def part(self, model: nn.Module, block: int) -> nn.Module | None:
        return JointProjection() if self.metric == "projected" else None

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        return super().schedule(depth, patches) if self.r is None else schedule.removals(self.r, depth)

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        if self.r is None:
            return super().counts(depth, patches, prefix)
        return schedule.merged(self.schedule(depth, patches)[:depth], patches, prefix)

    def macs(self, block, n_attention: int, n_mlp: int) -> int:
        attn = block.attn
        more = attn.qkv.in_features * attn.head_dim if self.metric == "projected" and n_mlp < n_attention else 0
        return super().macs(block, n_attention, n_mlp) + n_attention * more

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, assign, m = self._attend(block, x, size, r)
        if assign is None:
            x = x + block.branch(y)
            return x + block.feed_forward(x), size, None
        x, size, y = block.merge_and_norm(x, y, assign, m, size)
        return x + block.feed_normed(y), size, assign

    def _attend(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, int]:
        """What the heads give, [B, H, N, D], assign [B, N] and M. What the projection gave ends here, before the MLP:
        its memory, still in the cache, serves that."""
        # Where r is known, r = 0 costs nothing; a graph compiled for any r keeps the ops, then the identity.
        reduces = not statically_known_true(r == 0)
        if reduces and self.metric == "projected":
            q, k, v, metric = self._project(block, x)
        else:
            q, k, v = block.project(x)
            metric = k
        assign, m = None, x.shape[1]
        if reduces:
            # Before the attention, while the keys are in the cache: on a CPU that is worth more than merging in the
            # same pass, 1 to 2 % of the model.
            assign, m = self._match(metric, size, r, block.tokred_prefix)
        return block.heads(q, k, v, size if self.prop_attn else None)[0], assign, m

    def _project(self, block, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, D], and the metric [B, N, D]."""
        if block.training:
            raise ValueError('tome: metric="projected" is for inference; call model.eval()')
        y = block.tokred_part(block.norm1(x), block.attn.qkv, block.attn.num_heads)
        D = block.attn.head_dim
        return *block.split_heads(y[..., :-D]), y[..., -D:]

    def _match(self, metric: Tensor, size: Tensor | None, r: int, prefix: int) -> tuple[Tensor, int]:
        """assign [B, N] for keys [B, H, N, D], or their head mean [B, N, D], and M."""
        N = metric.shape[-2]
        assign = torch.ops.tokred.match(metric, r, prefix)
        left = N - max(0, min(r, (N - prefix) // 2))
        in_rounds = self.keep_rate is not None or self.tokens is not None  # not self.r, which would recompile for each
        if not in_rounds or left == N - r:
            return assign, left
        metric, last = metric.to(torch.promote_types(metric.dtype, torch.float32)), assign
        metric = metric.mean(1) if metric.dim() == 4 else metric
        while left > N - r:
            metric, size = torch.ops.tokred.merge(metric, last, left, size)
            last = torch.ops.tokred.match(metric, left - (N - r), prefix)
            assign = compose(assign, last)
            left -= min(left - (N - r), (left - prefix) // 2)
        return assign, left
