"""nearest: the nearest centre of every token.

nearest_kernel    BI tokens of an image against BK centres at a time: a gather of their columns, a running argmin, and
                  which centre a token is itself.

Floor, B=256 N=196 K=137 on an H200: 196 x 137 distances from as many sectors as N x N have, 39 MB = 8.2 us.

Registers and shared memory, no spills        sm_80          sm_90          sm_100         gfx942
    nearest_kernel                            40, 1 KB       56, 1 KB       56, 1 KB       32, 128 B
    nearest_kernel, pinned                    48, 1 KB       56, 1 KB       56, 1 KB       48, 128 B
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ._clusters import NONE, blocks, checked_distance, keep_first, ordered, tile
from ._launch import refuse_stray_rows


@triton.jit(do_not_specialize=["N", "K"])
def nearest_kernel(
    distance_ptr,  # [B, N, N] float32
    centre_ptr,  # [B, K] int32
    label_ptr,  # [B, N] int32
    N,
    K,
    s_b,
    s_n,
    PIN: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    parts = tl.cdiv(N, BI)
    b = (tl.program_id(0) // parts).to(tl.int64)
    i = tl.program_id(0) % parts * BI + tl.arange(0, BI)
    row = distance_ptr + b * s_b + i.to(tl.int64) * s_n
    best = tl.full([BI], float("inf"), tl.float32)
    label = tl.full([BI], NONE, tl.int32)
    own = tl.full([BI], NONE, tl.int32)
    for start in range(0, K, BK):
        c = start + tl.arange(0, BK)
        centre = tl.load(centre_ptr + b * K + c, mask=c < K, other=-1)[None, :]
        real = (i < N)[:, None] & (centre >= 0) & (centre < N)
        d = ordered(tl.load(row[:, None] + centre, mask=real, other=0.0))
        best, label = keep_first(d, real, c[None, :], best, label)
        if PIN:
            own = tl.minimum(own, tl.min(tl.where(centre == i[:, None], c[None, :], NONE), 1))
    label = tl.where(own != NONE, own, tl.where(label != NONE, label, -1))
    tl.store(label_ptr + b * N + i, label, mask=i < N)


def nearest_triton(distance: Tensor, centres: Tensor, *, pin: bool = False) -> Tensor:
    _check.nearest(distance, centres)
    distance = checked_distance("nearest", distance)
    B, N, _ = distance.shape
    K = centres.shape[1]
    refuse_stray_rows("nearest", centres, N, "centres", "N")
    label = distance.new_empty(B, N, dtype=torch.int32)
    if label.numel() > 0:
        BI, BK = tile(K)
        strides = distance.stride()[:2]
        with torch.cuda.device_of(distance):
            nearest_kernel[blocks(distance, BI)](
                distance, centres.contiguous(), label, N, K, *strides, PIN=pin, BI=BI, BK=BK
            )
    return label
