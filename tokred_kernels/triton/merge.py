"""merge: the tokens of one output row, added in index order.

    mean: out_j = sum_i w_i x_i / sum_i w_i over assign_i = j;   sum w = 0: sum_i x_i / count;   one member: x_i itself
    sum:  out_j = sum_i w_i x_i;   amax: out_j = max_i x_i, NaN wins;   no member: 0;   size_out_j = sum_i size_i
    add_merge_norm: the mean of x + branch_scale (branch + branch_bias), and the LayerNorm of out_j

merge_kernel   one warp: an output row and a block of BC channels. It finds its members by comparing all of assign with
               its row: 788 bytes at N = 197, from L1, and no second launch. Four members are in flight at a time, so
               that a row with many is bound by memory and not by its latency. add_merge_norm: a program has all
               channels of its row, 32 bytes a lane, and normalises them in registers; two members in flight.
order_kernel   only where N > _SCANNED: the members of every row as a list, order [B, N] from start [B, M + 1], by a
               stable counting sort: N^2 comparisons by all of the GPU instead of M N by the warps of merge_kernel.

Floor, DeiT-S B=256 N=197 r=13 C=384 bfloat16 on an H200: x once 38.7 MB, out 36.2 MB = 17.4 us; size and assign 0.6 MB.
add_merge_norm: x and branch 77.5 MB, out and normed 72.4 MB = 34.9 us; the addition and the norm of a block that does
not merge, in one kernel, take 36.0 us.

Registers, no spills                          sm_80          sm_90          sm_100         gfx942
    merge_kernel, N = 197, bfloat16           79             72             80             56
    merge_kernel, N = 197, float32            96             96             128            56
    order_kernel                              89             89             89             40
    merge_kernel with a norm, bfloat16        64             64             64             48
    merge_kernel with a norm, float32         56             48             47             41, and 8 B shared
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ._launch import inner_contiguous, per_token, refuse_float64, refuse_stray_rows
from ._norm import block_of, channel_rows, load_sum, store_normed

_SCANNED = 1024  # tokens that one warp compares in registers: 32 a lane


@triton.jit
def _row(assign_ptr, i, N, M):
    """The output rows of tokens i; M for a dropped one."""
    row = tl.load(assign_ptr + i, mask=i < N, other=-1)
    return tl.where((row < 0) | (row >= M), M, row)


@triton.jit(do_not_specialize=["N", "M"])
def order_kernel(
    assign_ptr,  # [B, N] int32
    order_ptr,  # [B, N] int32: the tokens by row, then by index; the dropped last
    start_ptr,  # [B, M + 1] int32: where the list of each row begins
    N,
    M,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    blocks = tl.cdiv(tl.maximum(N, M + 1), BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)  # both a token and a row
    assign_ptr += b * N
    row = _row(assign_ptr, i, N, M)[:, None]
    before = tl.zeros([BI, BO], tl.int32)
    below = tl.zeros([BI, BO], tl.int32)
    for start in range(0, N, BO):
        o = start + tl.arange(0, BO)
        other = _row(assign_ptr, o, N, M)[None, :]
        before += ((other < row) | ((other == row) & (o[None, :] < i[:, None]))).to(tl.int32)
        below += (other < i[:, None]).to(tl.int32)
    tl.store(order_ptr + b * N + tl.sum(before, 1), i, mask=i < N)
    tl.store(start_ptr + b * (M + 1) + i, tl.sum(below, 1), mask=i <= M)


@triton.jit
def _next(members, after, order_ptr, t, count):
    """Member t of the row: from its list, or the least index in members above `after`."""
    if order_ptr is None:
        return tl.min(tl.where(members > after, members, 2147483647), 0)
    else:
        return tl.load(order_ptr + t, mask=t < count, other=0)


@triton.jit
def _add_up(
    x_ptr,
    branch_ptr,
    scale_ptr,
    shift_ptr,
    w_ptr,
    size_ptr,
    order_ptr,
    members,
    first,
    count,
    c,
    C,
    s_n,
    branch_s_n,
    AMAX: tl.constexpr,
):
    """acc [BC] = sum w x (AMAX: max x), sum w, sum size, over the members in index order."""
    AHEAD: tl.constexpr = 4 if branch_ptr is None else 2
    EMPTY: tl.constexpr = float("-inf") if AMAX else 0.0
    acc = tl.full([c.shape[0]], EMPTY, tl.float32)
    total = 0.0
    size = 0.0
    i = first
    for start in range(0, count, AHEAD):
        for t in tl.static_range(AHEAD):
            there = start + t < count
            if branch_ptr is None:
                x = tl.load(x_ptr + i.to(tl.int64) * s_n + c, mask=there & (c < C), other=EMPTY).to(tl.float32)
            else:
                x = load_sum(x_ptr, branch_ptr, scale_ptr, shift_ptr, i, s_n, branch_s_n, c, there & (c < C))
            w = 1.0
            if w_ptr is not None:
                w = tl.load(w_ptr + i, mask=there, other=0.0)
                total += w
            if AMAX:
                acc = tl.where((x > acc) | (x != x), x, acc)
            else:
                acc += w * x
            if size_ptr is not None:
                size += tl.load(size_ptr + i, mask=there, other=0.0)
            i = _next(members, i, order_ptr, start + t + 1, count)
    if w_ptr is None:
        total = count.to(tl.float32)
    if size_ptr is None:
        size = count.to(tl.float32)
    return acc, total, size


@triton.jit(do_not_specialize=["N", "M"])
def merge_kernel(
    x_ptr,  # [B, N, C]
    branch_ptr,  # [B, N, C] or None, and then no norm
    scale_ptr,  # [C] or None: 1, of the branch
    shift_ptr,  # [C] or None: 0, its bias
    assign_ptr,  # [B, N] int32
    order_ptr,  # [B, N] int32 or None: scan assign
    start_ptr,  # [B, M + 1] int32 or None
    w_ptr,  # [B, N] float32 or None: 1
    size_ptr,  # [B, N] float32 or None: 1
    out_ptr,  # [B, M, C]
    size_out_ptr,  # [B, M] float32
    normed_ptr,  # [B, M, C] or None
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
    REDUCE: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    blocks = tl.cdiv(tl.maximum(C, 1), BC)
    b = (tl.program_id(0) // blocks // M).to(tl.int64)
    j = tl.program_id(0) // blocks % M
    block = tl.program_id(0) % blocks
    c = block * BC + tl.arange(0, BC)
    x_ptr += b * s_b
    out_ptr += (b * M + j) * C
    size_out_ptr += b * M + j
    if branch_ptr is not None:
        branch_ptr += b * branch_s_b
        normed_ptr += (b * M + j) * C
    if w_ptr is not None:
        w_ptr += b * N
    if size_ptr is not None:
        size_ptr += b * N
    if order_ptr is None:
        i = tl.arange(0, BS)
        hit = tl.load(assign_ptr + b * N + i, mask=i < N, other=-1) == j
        members = tl.where(hit, i, 2147483647)
        first = tl.min(members, 0)
        count = tl.sum(hit.to(tl.int32), 0)
    else:
        members = None
        start = tl.load(start_ptr + b * (M + 1) + j)
        count = tl.load(start_ptr + b * (M + 1) + j + 1) - start
        order_ptr += b * N + start
        first = tl.load(order_ptr, mask=count > 0, other=0)

    if (count == 1) & (REDUCE != "sum"):  # most rows: the bits, not the value, so that -0 and NaN stay what they are
        if branch_ptr is None:
            tl.store(out_ptr + c, tl.load(x_ptr + first.to(tl.int64) * s_n + c, mask=c < C), mask=c < C)
        else:
            row = load_sum(x_ptr, branch_ptr, scale_ptr, shift_ptr, first, s_n, branch_s_n, c, c < C)
            store_normed(row, out_ptr, normed_ptr, norm_weight_ptr, norm_bias_ptr, eps, c, C)
        size = 1.0
        if size_ptr is not None:
            size = tl.load(size_ptr + first)
        if block == 0:
            tl.store(size_out_ptr, size)
    else:
        acc, total, size = _add_up(
            x_ptr,
            branch_ptr,
            scale_ptr,
            shift_ptr,
            w_ptr,
            size_ptr,
            order_ptr,
            members,
            first,
            count,
            c,
            C,
            s_n,
            branch_s_n,
            REDUCE == "amax",
        )
        if REDUCE == "mean":
            if w_ptr is not None and total == 0.0:
                acc, total, _ = _add_up(
                    x_ptr,
                    branch_ptr,
                    scale_ptr,
                    shift_ptr,
                    None,
                    None,
                    order_ptr,
                    members,
                    first,
                    count,
                    c,
                    C,
                    s_n,
                    branch_s_n,
                    False,
                )
            acc = tl.div_rn(acc, tl.where(count == 0, 1.0, total))
        elif REDUCE == "amax":
            acc = tl.where(count == 0, 0.0, acc)
        if branch_ptr is None:
            tl.store(out_ptr + c, acc.to(out_ptr.dtype.element_ty), mask=c < C)
        else:
            store_normed(acc, out_ptr, normed_ptr, norm_weight_ptr, norm_bias_ptr, eps, c, C)
        if block == 0:
            tl.store(size_out_ptr, size)


def _lists(assign: Tensor, m: int) -> tuple[Tensor | None, Tensor | None]:
    """(order, start) of order_kernel, or nothing where assign is short enough to be scanned."""
    B, N = assign.shape
    if N <= _SCANNED:
        return None, None
    order = assign.new_empty(B, N)
    start = assign.new_empty(B, m + 1)
    order_kernel[(B * triton.cdiv(max(N, m + 1), 128),)](assign, order, start, N, m, BI=128, BO=16)
    return order, start


def launch_merge(
    x: Tensor, assign: Tensor, m: int, size: Tensor | None, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    """merge for arguments that are checked."""
    B, N, C = x.shape
    out = x.new_empty(B, m, C)
    size_out = x.new_empty(B, m, dtype=torch.float32)
    if size_out.numel() == 0:
        return out, size_out
    x, assign, size, weight = inner_contiguous(x), assign.contiguous(), per_token(size), per_token(weight)
    w = {"mean": size if weight is None else weight, "sum": weight, "amax": None}[reduce]
    BS = triton.next_power_of_2(min(max(N, 64), _SCANNED))
    BC = min(512, triton.next_power_of_2(max(C, 64)))
    grid = (B * m * max(1, triton.cdiv(C, BC)),)
    with torch.cuda.device_of(x):
        order, start = _lists(assign, m)
        strides = x.stride(0), x.stride(1), 0, 0
        merge_kernel[grid](
            x, None, None, None, assign, order, start, w, size, out, size_out, None, None, None, N, m, C, *strides,
            0.0, reduce, BS, BC, num_warps=1,
        )  # fmt: skip
    return out, size_out


def launch_merge_norm(
    x: Tensor,
    branch: Tensor,
    assign: Tensor,
    m: int,
    rows: tuple[Tensor | None, ...],
    size: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """add_merge_norm for arguments that are checked, C at most WIDEST; rows: of the norm, then of the branch."""
    B, N, C = x.shape
    out, normed = x.new_empty(B, m, C), x.new_empty(B, m, C)
    size_out = x.new_empty(B, m, dtype=torch.float32)
    if size_out.numel() == 0:
        return out, size_out, normed
    x, branch, assign, size = inner_contiguous(x), inner_contiguous(branch), assign.contiguous(), per_token(size)
    weight, bias, scale, shift = channel_rows(*rows)
    BS = triton.next_power_of_2(min(max(N, 64), _SCANNED))
    BC, num_warps = block_of(C, 32 // x.element_size())
    with torch.cuda.device_of(x):
        order, start = _lists(assign, m)
        strides = x.stride(0), x.stride(1), branch.stride(0), branch.stride(1)
        merge_kernel[(B * m,)](
            x, branch, scale, shift, assign, order, start, size, size, out, size_out, normed, weight, bias, N, m, C,
            *strides, eps, "mean", BS, BC, num_warps=num_warps,
        )  # fmt: skip
    return out, size_out, normed


def merge_triton(
    x: Tensor,
    assign: Tensor,
    m: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    _check.merge(x, assign, m, size, weight, reduce)
    refuse_float64("merge", "x", x)
    refuse_stray_rows("merge", assign, m)
    return launch_merge(x, assign, m, size, weight, reduce)
