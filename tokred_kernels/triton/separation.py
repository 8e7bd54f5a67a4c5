"""separation: the distance of each token to the nearest denser one; for the densest the largest of the image.

separation_kernel    an image, BI rows at a time beside the densities. One token, the densest, has no denser one; the
                     largest finite distance, which is its result, is known when all rows have passed.

Floor, B=256 N=196 on an H200: distances once, 39 MB = 8.2 us. A single image is the work of one multiprocessor, 154 KB
at about 50 GB/s: 3 us.

Registers and shared memory, no spills        sm_80          sm_90          sm_100         gfx942
    separation_kernel, N = 196                56, 128 B      56, 128 B      56, 128 B      62, 64 B
    separation_kernel, N = 576                71, 512 B      64, 512 B      71, 512 B      62, 64 B
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ._clusters import checked_distance, tile
from ._launch import per_token


@triton.jit
def _density(density_ptr, i, N):
    density = tl.load(density_ptr + i, mask=i < N, other=0.0)
    return tl.where(density == density, density, float("-inf"))


@triton.jit(do_not_specialize=["N"])
def separation_kernel(
    distance_ptr,  # [B, N, N] float32
    density_ptr,  # [B, N] float32
    out_ptr,  # [B, N] float32
    N,
    s_b,
    s_n,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    distance_ptr += b * s_b
    density_ptr += b * N
    out_ptr += b * N
    largest = tl.full([BI], float("-inf"), tl.float32)
    densest = 0
    for top in range(0, N, BI):
        i = top + tl.arange(0, BI)
        mine = _density(density_ptr, i, N)[:, None]
        best = tl.full([BI], float("inf"), tl.float32)
        count = tl.zeros([BI], tl.int32)
        for start in range(0, N, BN):
            j = start + tl.arange(0, BN)
            inside = (i < N)[:, None] & (j < N)[None, :]
            at = distance_ptr + i.to(tl.int64)[:, None] * s_n + j[None, :]
            d = tl.load(at, mask=inside, other=float("inf"))
            other = _density(density_ptr, j, N)[None, :]
            denser = inside & ((other > mine) | ((other == mine) & (j[None, :] < i[:, None])))
            best = tl.minimum(best, tl.min(tl.where(denser & (d == d), d, float("inf")), 1))
            count += tl.sum(denser.to(tl.int32), 1)
            finite = tl.abs(d) < float("inf")
            largest = tl.maximum(largest, tl.max(tl.where(finite, d, float("-inf")), 1))
        tl.store(out_ptr + i, best, mask=(i < N) & (count > 0))
        densest += tl.sum(tl.where((i < N) & (count == 0), i, 0), 0)
    tl.store(out_ptr + densest, tl.max(largest, 0))


def separation_triton(distance: Tensor, density: Tensor) -> Tensor:
    _check.separation(distance, density)
    distance = checked_distance("separation", distance)
    B, N, _ = distance.shape
    out = distance.new_empty(B, N)
    if out.numel() > 0:
        BI, BN = tile(N)
        with torch.cuda.device_of(distance):
            separation_kernel[(B,)](distance, per_token(density), out, N, *distance.stride()[:2], BI=BI, BN=BN)
    return out
