"""topk: the k patches with the best scores keep their order, the others are dropped or share one more row.

topk_kernel    an image. The k-th largest key by bisection on its 32 bits, a count of all keys for each, fewer where a
               count is k; then assign, of keys equal to it the first. A key is a score as an integer of the same
               order, -0 like +0, NaN like -inf. Up to BI patches a pass, so that nothing limits N.

Floor, B=256 N=197 on an H200: scores and assign, 0.4 MB = 0.1 us; at most 33 passes over the scores, from L1.

Registers and shared memory, no spills        sm_80          sm_90          sm_100         gfx942
    topk_kernel, N = 197                      40, 32 B       40, 32 B       40, 32 B       27, 16 B
    topk_kernel, N > 513                      72, 128 B      80, 128 B      80, 128 B      69, 64 B
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ._launch import per_token, refuse_float64

_BLOCK = 1024  # patches a pass


@triton.jit
def _keys(score_ptr, i, P):
    """int32, in the order of the scores; the lowest integer, which no score has, outside [0, P)."""
    score = tl.load(score_ptr + i, mask=i < P, other=0.0)
    score = tl.where(score == score, score, float("-inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(i < P, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -2147483648)


@triton.jit(do_not_specialize=["N", "prefix", "k", "others"])
def topk_kernel(
    score_ptr,  # [B, N] float32
    assign_ptr,  # [B, N] int32
    N,
    prefix,
    k,
    others,  # the row of the patches that are not kept; -1: dropped
    BI: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BI)
    P = N - prefix
    for start in range(0, prefix, BI):
        tl.store(assign_ptr + b * N + start + lane, start + lane, mask=start + lane < prefix)
    score_ptr += b * N + prefix
    assign_ptr += b * N + prefix

    found = tl.full((), -2147483648, tl.int64)  # the k-th largest key, as far as its bits are known
    above = 0  # keys that are larger than it and all it may still become
    total = -1
    bit = tl.full((), 2147483648, tl.int64)
    while (bit > 0) & (total != k):
        candidate = (found + bit).to(tl.int32)
        count = tl.zeros([BI], tl.int32)
        for start in range(0, P, BI):
            count += (_keys(score_ptr, start + lane, P) >= candidate).to(tl.int32)
        total = tl.sum(count, 0)
        found = tl.where(total >= k, found + bit, found)
        above = tl.where(total >= k, above, total)
        bit = bit >> 1

    bound = found.to(tl.int32)
    wanted = k - above  # of the keys equal to it; at least all of them where a count was k
    larger_before = 0
    equal_before = 0
    for start in range(0, P, BI):
        i = start + lane
        key = _keys(score_ptr, i, P)
        larger = (key > bound).to(tl.int32)
        equal = (key == bound).to(tl.int32)
        row_larger = larger_before + tl.cumsum(larger, 0) - larger
        row_equal = equal_before + tl.cumsum(equal, 0) - equal
        kept = (key > bound) | ((key == bound) & (row_equal < wanted))
        row = prefix + row_larger + tl.minimum(row_equal, wanted)
        tl.store(assign_ptr + i, tl.where(kept, row, others), mask=i < P)
        larger_before += tl.sum(larger, 0)
        equal_before += tl.sum(equal, 0)


def launch_topk(score: Tensor, k: int, prefix: int, fuse: bool) -> Tensor:
    """topk for arguments that are checked."""
    B, N = score.shape
    P = N - prefix
    assign = score.new_empty(B, N, dtype=torch.int32)
    if assign.numel() == 0:
        return assign
    if k >= P:
        return assign.copy_(torch.arange(N, device=assign.device, dtype=torch.int32))
    BI = min(_BLOCK, max(64, triton.next_power_of_2(P)))
    with torch.cuda.device_of(score):
        topk_kernel[(B,)](per_token(score), assign, N, prefix, k, prefix + k if fuse else -1, BI=BI)
    return assign


def topk_triton(score: Tensor, k: int, prefix: int = 1, fuse: bool = False) -> Tensor:
    _check.topk("topk", score, k, prefix)
    refuse_float64("topk", "score", score)
    return launch_topk(score, k, prefix, fuse)
