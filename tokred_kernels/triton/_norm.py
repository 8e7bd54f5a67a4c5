"""What the kernels of add_merge_norm and add_topk_gather_norm share: the residual sum of a token and the LayerNorm of a
row, which is in registers as a whole."""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import inner_contiguous

# Channels of a row in registers; wider ones take the op's steps one by one.
WIDEST = 2048


@triton.jit
def load_sum(x_ptr, branch_ptr, scale_ptr, shift_ptr, i, s_n, branch_s_n, c, there):
    """x + scale (branch + shift) of token i, rounded to the type of x, as float32; 0 where it is not there."""
    x = tl.load(x_ptr + i.to(tl.int64) * s_n + c, mask=there, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + i.to(tl.int64) * branch_s_n + c, mask=there, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        branch += tl.load(shift_ptr + c, mask=there, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        branch *= tl.load(scale_ptr + c, mask=there, other=0.0).to(tl.float32)
    return (x + branch).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def store_normed(row, out_ptr, normed_ptr, weight_ptr, bias_ptr, eps, c, C):
    """out = row [BC] and its LayerNorm, of the values that out has."""
    out = row.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + c, out, mask=c < C)
    row = tl.where(c < C, out.to(tl.float32), 0.0)
    mean = tl.sum(row, 0) / C
    apart = tl.where(c < C, row - mean, 0.0)
    variance = tl.sum(apart * apart, 0) / C
    normed = apart * (1.0 / tl.sqrt_rn(variance + eps))
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(normed_ptr + c, normed.to(normed_ptr.dtype.element_ty), mask=c < C)


def block_of(C: int, lane: int) -> tuple[int, int]:
    """(channels of a block, its warps) with up to `lane` channels a lane: 16 of half precision or 8 of float32 fit."""
    BC = triton.next_power_of_2(max(C, 64))
    return BC, max(1, BC // (32 * lane))


def channel_rows(*rows: Tensor | None) -> tuple[Tensor | None, ...]:
    """[C] with an inner stride of 1, in any floating dtype: no copy in the steady state."""
    return tuple(None if t is None else inner_contiguous(t) for t in rows)


def layer_norm(row: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's, in the dtype of row, with weights of any dtype."""
    wide = row.float()
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(wide, row.shape[-1:], weight, bias, eps).to(row.dtype)
