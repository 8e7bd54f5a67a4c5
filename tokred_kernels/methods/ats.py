"""ATS: in a few blocks, sample patches by what the class token attends to, and run attention for their rows alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..models._attention import class_rows
from ._staged import Staged

_ONE = 2**40  # shares in fixed point: their sums are exact, in any order, and so is the search for the nearest
_FLOOR = 1e-6


@dataclass(frozen=True)
class ATS(Staged):
    """Adaptive token sampling, for any trained model with a class token; it gains from fine-tuning.

    In each stage the patches share 1 in proportion to the attention of the class token, weighed by how long the values
    are that it reads, and are laid out on a line in their order. Of n points on that line each picks the patch whose
    end is nearest (of two, the first), so that patches with large shares are certain to stay, and many points may pick
    the same one:

        s_j   = sum_h softmax(q k^T D^-1/2)_h0j ||v_hj||,   S_j = s_j / (sum_i s_i + 1e-6)
        y_t   = (2 t + 1) / (2 (n + 1)),   t = 0 .. n - 1
        kept  = { argmin_j |S_0 + ... + S_j - y_t| }

    The block's attention then has a row for each kept token, and keys and values of all. The keep rate is a bound: an
    image keeps between 1 and n patches. Rows that are missing to n are class tokens of size 0, behind the others, so
    that shapes are static; nothing attends to them and no head pools them. What was really kept is
    `tokred_kernels.trace(...).counts`.
    Source: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, in the form of Haurum
    et al., "Which Tokens to Use?", ICCVW 2023, with the points from integers and exact distances.

    Options: those of `tokred_kernels.methods.Staged`.

    Raises:
        ValueError: an option is malformed; the model has no such block, or no class token, or heads wider than 128.
    """

    sized: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if not model.has_class_token:
            raise ValueError("ats: the model has no class token to score by")
        self._check_heads(model)

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        q, k, v = block.project(x)
        seen, assign = size, None
        if r != 0:
            score = (class_rows(q, k, size) * v.detach().norm(dim=-1, dtype=_wide(v))).sum(1)
            source, assign = sample(score, size, block.tokred_prefix, x.shape[1] - block.tokred_prefix - r)
            x, q = torch.ops.tokred.unmerge(x, source), _rows(q, source)
            size = (torch.arange(x.shape[1], device=x.device) < (assign >= 0).sum(1, keepdim=True)).float()
        x = x + block.attend(q, k, v, seen)[0]
        return x + block.feed_forward(x), size, assign


def sample(score: Tensor, size: Tensor | None, prefix: int, n: int) -> tuple[Tensor, Tensor]:
    """The prefix and at most n patches, by the definition above.

    Args:
        score: [B, N], at least 0 and NaN counts as 0; those of the prefix are ignored.
        size: [B, N]; tokens of size 0 are not picked.

    Returns:
        source [B, prefix + n] int32, the token of each row, 0 in rows to spare; assign [B, N] int32, the row of each
        token, -1 if dropped.
    """
    B, N = score.shape
    patch = score[:, prefix:]
    patch = torch.where(patch > 0, patch, 0)
    share = (patch / (patch.sum(1, keepdim=True) + _FLOOR)).nan_to_num(0)
    end = (share * _ONE).long().cumsum(1)
    point = torch.arange(1, 2 * n, 2, device=score.device) * _ONE
    gap = (2 * (n + 1) * end[:, None] - point[:, None]).abs()  # [B, n, P]
    if size is not None:
        gap = gap.masked_fill(size[:, None, prefix:] <= 0, torch.iinfo(gap.dtype).max)
    kept = torch.ones_like(score, dtype=torch.bool)
    kept[:, prefix:] = torch.zeros_like(patch, dtype=torch.bool).scatter(1, gap.argmin(2), True)
    row = kept.cumsum(1) - 1
    token = torch.arange(N, device=score.device).expand(B, -1)
    spare = prefix + n
    source = token.new_zeros(B, spare + 1).scatter(1, torch.where(kept, row, spare), token)[:, :spare]
    return source.int(), torch.where(kept, row, -1).int()


def _rows(t: Tensor, source: Tensor) -> Tensor:
    """Rows of t [B, H, N, D]: [B, H, M, D]."""
    rows = torch.ops.tokred.unmerge(t.transpose(1, 2).flatten(2), source)
    return rows.unflatten(2, (t.shape[1], t.shape[3])).transpose(1, 2)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
