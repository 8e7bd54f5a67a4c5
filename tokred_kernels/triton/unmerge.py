"""unmerge: x_i = y[assign_i], 0 where the token was dropped; exact copies.

unmerge_kernel   BN tokens of an image and BC channels: one gather of BN rows, one store.

Floor, DeiT-S B=256 N=197 M=184 C=384 bfloat16 on an H200: y once 36.2 MB, x 38.7 MB = 17.4 us.
Registers 30, no shared memory, no spills on sm_80, 90, 100 and gfx942.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ._launch import inner_contiguous, refuse_float64, refuse_stray_rows


@triton.jit(do_not_specialize=["N", "M"])
def unmerge_kernel(
    y_ptr,  # [B, M, C]
    assign_ptr,  # [B, N] int32
    x_ptr,  # [B, N, C]
    N,
    M,
    C,
    s_b,
    s_m,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    blocks = tl.cdiv(C, BC)
    token_blocks = tl.cdiv(N, BN)
    b = (tl.program_id(0) // blocks // token_blocks).to(tl.int64)
    i = tl.program_id(0) // blocks % token_blocks * BN + tl.arange(0, BN)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    row = tl.load(assign_ptr + b * N + i, mask=i < N, other=-1)
    kept = (row >= 0) & (row < M)
    from_row = y_ptr + b * s_b + row.to(tl.int64)[:, None] * s_m + c[None, :]
    y = tl.load(from_row, mask=kept[:, None] & (c < C)[None, :], other=0.0)
    tl.store(x_ptr + (b * N + i)[:, None] * C + c[None, :], y, mask=(i < N)[:, None] & (c < C)[None, :])


def unmerge_triton(y: Tensor, assign: Tensor) -> Tensor:
    _check.unmerge(y, assign)
    refuse_float64("unmerge", "y", y)
    B, M, C = y.shape
    N = assign.shape[1]
    refuse_stray_rows("unmerge", assign, M)
    x = y.new_empty(B, N, C)
    if x.numel() == 0:
        return x
    y, assign = inner_contiguous(y), assign.contiguous()
    BC = min(512, triton.next_power_of_2(max(C, 16)))
    BN = 2048 // BC
    grid = (B * triton.cdiv(N, BN) * triton.cdiv(C, BC),)
    with torch.cuda.device_of(y):
        unmerge_kernel[grid](y, assign, x, N, M, C, y.stride(0), y.stride(1), BN=BN, BC=BC)
    return x
