"""add_topk_gather_norm: topk, then the sum of the kept tokens, the fused row of the others, and their LayerNorm.

    y_i = x_i + branch_scale (branch_i + branch_bias)
    out_j = y_i where assign_i = j
    fused = sum_i score_i y_i over the others;   mean: / sum_i score_i, or sum_i y_i / count where that is 0
    normed_j = (out_j - mean) / sqrt(variance + eps) * norm_weight + norm_bias

gather_norm_kernel  a token with all its channels, 8 a lane, normalised in registers. The first program of an image has
                    the fused row: it walks over all tokens in index order and leaves out the kept ones, 16 loads in
                    flight, of float32 8.

Floor, DeiT-S B=256 N=197 k=138 C=384 bfloat16 on an H200: x and branch 77.5 MB, out and normed 55.1 MB = 30.8 us; the
addition and the norm of a block that drops nothing, in one kernel, take 36.0 us.

Registers, 8 B of shared memory, no spills    sm_80          sm_90          sm_100         gfx942
    gather_norm_kernel, bfloat16              64             90             86             72
    gather_norm_kernel, float32               55             52             48             47
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ..reference import residual
from ._launch import inner_contiguous, per_token, refuse_float64
from ._norm import WIDEST, block_of, channel_rows, layer_norm, load_sum, store_normed
from .topk import launch_topk


@triton.jit
def _add_up(x_ptr, branch_ptr, scale_ptr, shift_ptr, w_ptr, assign_ptr, row, c, N, C, s_n, branch_s_n):
    """sum w y [BC] and sum w over the tokens of a row, in index order; w_ptr None: 1."""
    acc = tl.zeros([c.shape[0]], tl.float32)
    total = 0.0
    AHEAD: tl.constexpr = 8 if x_ptr.dtype.element_ty.primitive_bitwidth == 16 else 4
    for start in range(0, N, AHEAD):
        for t in tl.static_range(AHEAD):
            i = start + t
            there = tl.load(assign_ptr + i, mask=i < N, other=-1) == row
            y = load_sum(x_ptr, branch_ptr, scale_ptr, shift_ptr, i, s_n, branch_s_n, c, there & (c < C))
            w = 1.0
            if w_ptr is not None:
                w = tl.load(w_ptr + i, mask=there, other=0.0)
                total += w
            acc += w * y
    return acc, total


@triton.jit(do_not_specialize=["N", "M", "copied"])
def gather_norm_kernel(
    x_ptr,  # [B, N, C]
    branch_ptr,  # [B, N, C]
    scale_ptr,  # [C] or None: 1, of the branch
    shift_ptr,  # [C] or None: 0, its bias
    score_ptr,  # [B, N] float32
    assign_ptr,  # [B, N] int32
    out_ptr,  # [B, M, C]
    normed_ptr,  # [B, M, C]
    norm_weight_ptr,  # [C] or None: 1
    norm_bias_ptr,  # [C] or None: 0
    N,
    M,
    C,
    s_b,
    s_n,
    branch_s_b,
    branch_s_n,
    eps,
    copied,  # rows of out that are copies; row `copied`, if there is one, is the weighted sum of the others
    MEAN: tl.constexpr,
    BC: tl.constexpr,
):
    fused = (copied < M).to(tl.int32)
    b = (tl.program_id(0) // (N + fused)).to(tl.int64)
    i = tl.program_id(0) % (N + fused) - fused
    c = tl.arange(0, BC)
    x_ptr += b * s_b
    branch_ptr += b * branch_s_b
    score_ptr += b * N
    assign_ptr += b * N
    if i < 0:
        row, total = _add_up(
            x_ptr, branch_ptr, scale_ptr, shift_ptr, score_ptr, assign_ptr, copied, c, N, C, s_n, branch_s_n
        )
        if MEAN:
            if total == 0.0:
                row, _ = _add_up(
                    x_ptr, branch_ptr, scale_ptr, shift_ptr, None, assign_ptr, copied, c, N, C, s_n, branch_s_n
                )
                total = (N - copied).to(tl.float32)
            row = tl.div_rn(row, total)
        to = (b * M + copied) * C
        store_normed(row, out_ptr + to, normed_ptr + to, norm_weight_ptr, norm_bias_ptr, eps, c, C)
    else:
        j = tl.load(assign_ptr + i)
        if (j >= 0) & (j < copied):
            row = load_sum(x_ptr, branch_ptr, scale_ptr, shift_ptr, i, s_n, branch_s_n, c, c < C)
            to = (b * M + j) * C
            store_normed(row, out_ptr + to, normed_ptr + to, norm_weight_ptr, norm_bias_ptr, eps, c, C)


def add_topk_gather_norm_triton(
    x: Tensor,
    branch: Tensor,
    score: Tensor,
    k: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    prefix: int = 1,
    branch_scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    fuse: str = "none",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.add_topk_gather_norm(x, branch, score, k, norm_weight, norm_bias, prefix, branch_scale, branch_bias, fuse)
    refuse_float64("add_topk_gather_norm", "x", x)
    B, N, C = x.shape
    if C > WIDEST:
        y = residual(x, branch, branch_scale, branch_bias)
        out, assign = torch.ops.tokred.topk_gather(y, score, k, prefix, fuse=fuse)
        return out, assign, layer_norm(out, norm_weight, norm_bias, eps)
    score = per_token(score)
    assign = launch_topk(score, k, prefix, fuse != "none")
    k = min(k, N - prefix)
    fused = fuse != "none" and k < N - prefix
    M = prefix + k + int(fused)
    out, normed = x.new_empty(B, M, C), x.new_empty(B, M, C)
    if out.numel() == 0:
        return out, assign, normed
    x, branch = inner_contiguous(x), inner_contiguous(branch)
    weight, bias, scale, shift = channel_rows(norm_weight, norm_bias, branch_scale, branch_bias)
    # A token alone in a mean is a copy too: w x / w would round.
    copied = M - 1 if fused and (fuse == "sum" or M < N) else M
    BC, num_warps = block_of(C, 8)
    strides = x.stride(0), x.stride(1), branch.stride(0), branch.stride(1)
    with torch.cuda.device_of(x):
        gather_norm_kernel[(B * (N + int(copied < M)),)](
            x, branch, scale, shift, score, assign, out, normed, weight, bias, N, M, C, *strides, eps, copied,
            fuse == "mean", BC, num_warps=num_warps,
        )  # fmt: skip
    return out, assign, normed
