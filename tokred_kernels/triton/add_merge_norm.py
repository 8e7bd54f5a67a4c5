"""add_merge_norm: merge_kernel of merge.py with a branch and a norm, one launch; rows beyond WIDEST channels take the
steps one by one."""

import torch
from torch import Tensor

from .. import _check
from ..reference import residual
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
    branch_scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.add_merge_norm(x, branch, assign, m, norm_weight, norm_bias, size, branch_scale, branch_bias)
    refuse_float64("add_merge_norm", "x", x)
    refuse_stray_rows("add_merge_norm", assign, m)
    if x.shape[2] <= WIDEST:
        rows = norm_weight, norm_bias, branch_scale, branch_bias
        return launch_merge_norm(x, branch, assign, m, rows, size, eps)
    out, size_out = torch.ops.tokred.merge(residual(x, branch, branch_scale, branch_bias), assign, m, size)
    return out, size_out, layer_norm(out, norm_weight, norm_bias, eps)
