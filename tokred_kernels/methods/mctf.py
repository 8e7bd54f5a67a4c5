"""MCTF: fuse patches by similarity, informativeness and size, and the block's attention map along with them."""

import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import schedule
from ..models._attention import scores_alone
from ._method import Method

LEAST_TOKENS = 10
_FLOOR = 1e-6  # of a column mean: what nobody looks at attracts most, but not infinitely


@dataclass(frozen=True)
class MCTF(Method):
    """Multi-criteria token fusion, for any trained model; it gains from fine-tuning.

    Two patches attract each other by how similar they are, how little the attention of this very block looks at them,
    and how small they are. With a the column mean of its attention matrix A, and s the sizes:

        W_ij = ((cos(x_i, x_j) + 1) / 2)^(1/t_sim) (h_i h_j)^(1/t_info) (z_i z_j)^(1/t_size)
        h_i  = min(a) / a_i,   z_i = min(s) / s_i

    `tokred_kernels.match` merges r // 2 patches at even positions into odd ones, then the others the other way round.
    A fused token is the mean of its members weighed by w = a s. All this happens at the start of the block, whose
    attention map is fused too instead of computed again, with M the assignment and V' the values of the fused tokens:

        A' = diag(1 / M w) M diag(w) A M^T,   out = A' V'

    which is merge(attention(q, k, unmerge(V')), weight=w): neither A nor A' is ever in memory. There is no gradient
    through W and w.
    Source: Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
    CVPR 2024.

    Options:
        r: patches to remove in each of the stages: an int; a fraction in (0, 1) of those that reach it, as in the
            published "fast" form with 0.35; or (int, inflection) over the stages, see
            `tokred_kernels.schedule.removals`. Or a list, an int or a fraction for each block. At most half of a
            block's patches, and never below 10 tokens.
        stages: the blocks that fuse. None: all but the first, and (3, 6, 9) for a fraction.
        one_step_ahead: 1 fuses tokens and attention map before the attention, as above. 2 fuses the tokens, then runs
            attention on them anew. 0 fuses behind the block, by the attention it had.
        t_sim, t_info, t_size: temperatures; 0 leaves a criterion out.
        bidirectional: False merges all r patches at even positions into odd ones.
        pooling: w = s with 0, a s with 1, 1 with 3; with 2 the largest of the members instead of a mean, of the rows of
            A' too, for which mode 1 holds A in memory.
        prop_attn: attention counts sizes.

    Raises:
        ValueError: an option is malformed; the model has no such block, or heads wider than 128, or, for mode 1,
            queries, keys and values that are no plain linear layer. Mode 0 in training under attention dropout.
    """

    r: schedule.Removal | float | list[float]
    stages: Sequence[int] | None = None
    one_step_ahead: int = 1
    t_sim: float = 1.0
    t_info: float = 20.0
    t_size: float = 40.0
    bidirectional: bool = True
    pooling: int = 1
    prop_attn: bool = True

    sized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        each = isinstance(self.r, list)
        if isinstance(self.r, tuple):
            object.__setattr__(self, "r", schedule.plain(self.r))
        for entry in self.r if each else [self.r[0] if isinstance(self.r, tuple) else self.r]:
            if not _is_count(entry) and not (_is_number(entry) and 0 < entry < 1):
                self._refuse("r must be ints of at least 0 or fractions in (0, 1)", self.r)
        if self.stages is not None:
            stages = self._integers("stages", self.stages, 0)
            if each or any(a >= b for a, b in itertools.pairwise(stages)):
                self._refuse("stages must be ascending, and left out where r is a list of all blocks", self.stages)
        if self.one_step_ahead not in (0, 1, 2) or isinstance(self.one_step_ahead, bool):
            self._refuse("one_step_ahead must be 0, 1 or 2", self.one_step_ahead)
        if self.pooling not in (0, 1, 2, 3) or isinstance(self.pooling, bool):
            self._refuse("pooling must be 0, 1, 2 or 3", self.pooling)
        for option in ("t_sim", "t_info", "t_size"):
            if not _is_number(getattr(self, option)) or not 0 <= getattr(self, option) < float("inf"):
                self._refuse(f"{option} must be a number of at least 0", getattr(self, option))
        for option in ("bidirectional", "prop_attn"):
            if not isinstance(getattr(self, option), bool):
                self._refuse(f"{option} must be True or False", getattr(self, option))

    def check(self, model: nn.Module) -> None:
        depth = len(model.blocks)
        self._check_heads(model)
        if self.one_step_ahead == 1 and any(type(block.attn.qkv) is not nn.Linear for block in model.blocks):
            raise ValueError(
                "mctf: one_step_ahead=1 projects values apart from queries and keys, which needs nn.Linear"
            )
        if isinstance(self.r, list):
            wanted = [*self.r, *[0] * (depth - len(self.r))][:depth]
        else:
            share = _is_number(self.r) and not _is_count(self.r)
            stages = self.stages if self.stages is not None else (3, 6, 9) if share else range(1, depth)
            if any(stage >= depth for stage in stages):
                self._refuse(f"stages must be below {depth}, the number of blocks", tuple(stages))
            wanted = [0] * depth
            removed = [self.r] * len(stages) if share else schedule.removals(self.r, len(stages)) if stages else ()
            for stage, r in zip(stages, removed, strict=True):
                wanted[stage] = r
        # Exact, in ints, as torch.compile wants it: a count, or numerator and denominator of a share.
        plan = [(int(r),) if _is_count(r) else Fraction(str(r)).as_integer_ratio() for r in wanted]
        object.__setattr__(self, "_plan", (model.num_prefix_tokens, tuple(plan)))

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        prefix, plan = self._plan
        removed = []
        for r, *whole in plan:
            if whole:
                r = patches * r // whole[0]
            r = max(0, min(r, patches // 2, prefix + patches - LEAST_TOKENS))
            removed.append(r)
            patches = patches - r
        return tuple(removed)

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        site = ("after", "middle", "before")[self.one_step_ahead]
        return schedule.selected(self.schedule(depth, patches), patches, prefix, False, site)

    def macs(self, block, n_attention: int, n_mlp: int) -> int:
        """In mode 1 as published: queries, keys and logits of all tokens, values and sums of the fused ones."""
        if self.one_step_ahead != 1:
            return super().macs(block, n_attention, n_mlp)
        width = block.attn.num_heads * block.attn.head_dim
        projected = 2 * width * block.attn.qkv.in_features
        more = projected * (n_attention - n_mlp) + width * (n_attention**2 - n_mlp**2)
        return schedule.block_macs(block, n_mlp, n_mlp) + more

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        fuses = not statically_known_true(r == 0)
        assign = None
        if fuses and self.one_step_ahead == 1:
            branch, x, size, assign = self._fused_attention(block, x, size, r)
            x = x + branch
            return x + block.feed_forward(x), size, assign
        if fuses and self.one_step_ahead == 2:
            q, k = block.project(x)[:2]
            x, size, assign, _ = self._fuse(x, scores_alone(q, k, self._seen(size)), size, r, block.tokred_prefix)
        after = fuses and self.one_step_ahead == 0
        branch, mean = block.attend(*block.project(x), self._seen(size), scores="mean" if after else "none")
        x = x + branch
        x = x + block.feed_forward(x)
        if after:
            x, size, assign, _ = self._fuse(x, mean.detach(), size, r, block.tokred_prefix)
        return x, size, assign

    def _seen(self, size: Tensor | None) -> Tensor | None:
        return size if self.prop_attn else None

    def _fuse(self, x: Tensor, mean: Tensor, size: Tensor | None, r: int, prefix: int):
        """The fused tokens of x [B, N, C] given the column mean [B, N], their sizes, assign and w [B, N]."""
        assign = torch.ops.tokred.match(
            x, r, prefix, self.weight(mean, size), power=_exponent(self.t_sim), two_way=self.bidirectional
        )
        w = mean if self.pooling == 1 else torch.ones_like(mean)
        if size is not None and self.pooling < 2:
            w = w * size
        x, size = self._pool(x, assign, x.shape[1] - r, size, w)
        return x, size, assign, w

    def weight(self, mean: Tensor, size: Tensor | None) -> Tensor:
        """h^(1/t_info) z^(1/t_size) [B, N]: what W has beside similarity."""
        mean = mean + _FLOOR
        weight = (mean.amin(1, keepdim=True) / mean) ** _exponent(self.t_info)
        if size is not None:
            weight = weight * (size.amin(1, keepdim=True) / size) ** _exponent(self.t_size)
        return weight

    def _pool(self, x: Tensor, assign: Tensor, m: int, size: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.pooling == 2:
            return torch.ops.tokred.merge(x, assign, m, size, reduce="amax")
        return torch.ops.tokred.merge(x, assign, m, size, w)

    def _fused_attention(self, block, x: Tensor, size: Tensor | None, r: int):
        """Mode 1: the attention branch [B, M, C] of the fused tokens, those tokens, their sizes, and assign."""
        queries_keys, values = block.projections()
        q, k = queries_keys(x)
        seen = self._seen(size)
        x, size, assign, w = self._fuse(x, scores_alone(q, k, seen), size, r, block.tokred_prefix)
        v = values(x)
        if self.pooling == 2:
            rows = _largest_rows(q, k, seen, assign, x.shape[1])
            return block.branch(block.attn.attn_drop(rows).to(v.dtype) @ v), x, size, assign
        y, _ = block.heads(q, k, _split(torch.ops.tokred.unmerge(_join(v), assign), v), seen)
        y, _ = torch.ops.tokred.merge(_join(y), assign, x.shape[1], None, w)
        return block.branch(_split(y, v)), x, size, assign


def _largest_rows(q: Tensor, k: Tensor, size: Tensor | None, assign: Tensor, m: int) -> Tensor:
    """A' [B, H, m, m] with, in each row and for each key, the largest probability of the row's members."""
    B, H, N, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) * D**-0.5) @ k.to(wide).mT
    if size is not None:
        logits = logits + size.log()[:, None, None]
    of_heads = assign.repeat_interleave(H, 0)
    keys, _ = torch.ops.tokred.merge(logits.softmax(-1).mT.reshape(B * H, N, N), of_heads, m, reduce="sum")
    rows, _ = torch.ops.tokred.merge(keys.mT, of_heads, m, reduce="amax")
    return rows.view(B, H, m, m)


def _join(t: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H D]."""
    return t.transpose(1, 2).flatten(2)


def _split(t: Tensor, like: Tensor) -> Tensor:
    """[B, N, H D] to [B, H, N, D]."""
    return t.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)


def _exponent(temperature: float) -> float:
    return 1 / temperature if temperature else 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 0
