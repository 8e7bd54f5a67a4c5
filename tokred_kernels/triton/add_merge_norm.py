"""add_merge_norm: merge_kernel of merge.py with a branch and a norm, one launch; rows beyond WIDEST channels take the
steps one by one."""

import torch
from torch import Tensor

from .. import _check
from ._launch import refuse_float64, refuse_stray_rows
from ._norm import WIDEST, layer_norm
from .merge import launch_merge_norm


def add_merge_norm_triton(
    x: Tensor,
    branch: Tensor,
    assign: Tensor,
    m: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    size: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.add_merge_norm(x, branch, assign, m, norm_weight, norm_bias, size)
    refuse_float64("add_merge_norm", "x", x)
    refuse_stray_rows("add_merge_norm", assign, m)
    if x.shape[2] <= WIDEST:
        return launch_merge_norm(x, branch, assign, m, norm_weight, norm_bias, size, eps)
    out, size_out = torch.ops.tokred.merge(x + branch, assign, m, size)
    return out, size_out, layer_norm(out, norm_weight, norm_bias, eps)
