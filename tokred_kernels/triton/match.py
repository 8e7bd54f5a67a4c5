"""match: bipartite soft matching, over the even positions a and the odd positions b after the prefix.

    unit_n  = k_n / max(|k_n|, 1e-6),  k_n the float32 mean of the heads in head order
    s_ij    = <unit_ai, unit_bj>       weighted: (max((s_ij + 1) / 2, 0)^power * weight_i) * weight_j;  NaN: -inf
    edge_i  = max_j s_ij, at its lowest column;   rank_i = #{o: edge_o > edge_i, or equal and o < i}
    assign  = rank_i < r ? p + Na - r + column_i : p + the kept a before i
Two ways, r / 2 leave a like that; then back_j = max_i s_ij over the kept a, and what is in the row of b_j goes
    rank_j < r_b ? p + the kept a before row_j : p + Na - r_a + rank_j - r_b,    r_a = r / 2, r_b = r - r_a

unit_kernel    BN tokens of an image -> scratch [B, N, 3, DP] bfloat16, each unit row as the sum of three terms, which
               together hold the 24 bits of a float32; DP = D padded with zeros to chunks of 64.
edges_kernel   BM rows a of an image, over tiles of BN columns b. A product is six bfloat16 tensor-core products with
               float32 accumulation, the smallest first: |s_ij - exact| < 1e-6. Every element of every tile adds in the
               same order, so equal rows have bitwise-equal scores. No score leaves the registers.
rank_kernel    BI rows a of an image against all others, Na^2 comparisons; only where Na > _RANKED_IN_ASSIGN.
assign_kernel  an image: ranks its rows (up to there), numbers the kept ones with a running cumsum, writes assign.
back_kernel    BN columns b of an image, over tiles of BM kept rows a: the same tiles, so the same scores.
follow_kernel  BI tokens of an image: those in the row of a b count the better edges of the others for it.

Floor, DeiT-S keys B=256 H=6 N=197 D=64 bfloat16 on an H200: K once, 38.7 MB = 9.0 us. The scratch, 19.4 MB written once
and read twice, stays in the 60 MB L2; the products are 6 x 0.32 GFLOP, 2.4 us of the tensor cores.

Registers and shared memory, no spills        sm_80          sm_90          sm_100         gfx942
    unit_kernel                               48             48             48             25
    edges_kernel, D <= 64                     128, 48 KB     94, 48 KB      124, 48 KB     140, 8 KB
    edges_kernel, D <= 64, weight and power   128, 36 KB     64, 36 KB      125, 36 KB     144, 8 KB
    edges_kernel, D > 64                      210, 12 KB     110, 36 KB     96, 36 KB      156, 8 KB
    rank_kernel                               76             71             71             30
    assign_kernel, N = 197                    64             64             64             44
    back_kernel, D <= 64                      168, 32 KB     112, 48 KB     168, 48 KB     168, 8 KB
    back_kernel, D <= 64, weight and power    160, 20 KB     88, 36 KB      168, 36 KB     216, 8 KB
    back_kernel, D > 64, weight and power     232, 12 KB     140, 36 KB     168, 36 KB     236, 8 KB
    follow_kernel                             64             64             64             34
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ._launch import inner_contiguous, per_token, refuse_float64

_RANKED_IN_ASSIGN = 512  # above, the Na^2 comparisons of a single program take longer than another launch


@triton.jit
def _head_mean(metric_ptr, n, d, H, N, s_h, s_n, D: tl.constexpr):
    """[BN, BD] float32: rows n averaged over the heads, 0 outside [N, D]."""
    at = metric_ptr + n.to(tl.int64)[:, None] * s_n + d[None, :]
    inside = (n < N)[:, None] & (d < D)[None, :]
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for _ in range(1, H):
        at += s_h
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return total * (1.0 / H)


@triton.jit
def _store_terms(at, x, inside, DP: tl.constexpr):
    """x = x0 + x1 + x2, each the rounding to bfloat16 of what the ones before it leave."""
    for term in tl.static_range(3):
        rounded = x.to(tl.bfloat16)
        tl.store(at + term * DP, rounded, mask=inside)
        x -= rounded.to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def unit_kernel(
    metric_ptr,  # [B, H, N, D]
    unit_ptr,  # [B, N, 3, DP] bfloat16
    H,
    N,
    s_b,
    s_h,
    s_n,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    blocks = tl.cdiv(N, BN)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    metric_ptr += b * s_b
    at = unit_ptr + (b * N + n)[:, None] * (3 * DP) + d[None, :]
    row_in = (n < N)[:, None]
    mean = _head_mean(metric_ptr, n, d, H, N, s_h, s_n, D)
    square = tl.sum(mean * mean, 1)
    for start in range(BD, DP, BD):
        more = _head_mean(metric_ptr, n, start + d, H, N, s_h, s_n, D)
        square += tl.sum(more * more, 1)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), 1e-6))[:, None]  # a NaN stays in its own channel
    _store_terms(at, mean * inverse, row_in & (d < DP)[None, :], DP)
    for start in range(BD, DP, BD):  # a row too long for the registers is read a second time
        more = _head_mean(metric_ptr, n, start + d, H, N, s_h, s_n, D)
        _store_terms(at + start, more * inverse, row_in & (start + d < DP)[None, :], DP)


@triton.jit
def _dot6(a_at, b_at, a_in, b_in, DP: tl.constexpr):
    """(a0 + a1 + a2)(b0 + b1 + b2) but for the terms below 2^-24."""
    a0 = tl.load(a_at, mask=a_in, other=0.0)
    a1 = tl.load(a_at + DP, mask=a_in, other=0.0)
    a2 = tl.load(a_at + 2 * DP, mask=a_in, other=0.0)
    b0 = tl.load(b_at, mask=b_in, other=0.0)
    b1 = tl.load(b_at + DP, mask=b_in, other=0.0)
    b2 = tl.load(b_at + 2 * DP, mask=b_in, other=0.0)
    total = tl.dot(a2, b0)
    total = tl.dot(a0, b2, total)
    total = tl.dot(a1, b1, total)
    total = tl.dot(a1, b0, total)
    total = tl.dot(a0, b1, total)
    return tl.dot(a0, b0, total)


@triton.jit
def _score_tile(
    a_at, b_at, a_in, b_in, weight_ptr, a_n, b_n, power, POWER: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr
):
    """[BM, BN] float32, NaN among them: rows a at a_at [BM, BD] and a_n [BM] against columns b at b_at [BD, BN]."""
    score = tl.zeros([a_at.shape[0], b_at.shape[1]], tl.float32)
    for k in range(0, DP, BD):
        # Tensor cores truncate their sums. Each chunk starts a sum of its own and is added here, rounded to
        # nearest: simulated at D = 1024, 4e-7 off, where one long chain is 8e-6 off.
        score += _dot6(a_at + k, b_at + k, a_in[:, None], b_in[None, :], DP)
    if weight_ptr is not None:
        score = tl.maximum((score + 1.0) * 0.5, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if POWER:
            score = tl.where(power == 0.0, 1.0, tl.exp2(power * tl.log2(score)))
        score *= tl.load(weight_ptr + a_n, mask=a_in, other=0.0)[:, None]
        score *= tl.load(weight_ptr + b_n, mask=b_in, other=0.0)[None, :]
    return score


@triton.jit(do_not_specialize=["N", "prefix", "Na", "Nb"])
def edges_kernel(
    unit_ptr,  # [B, N, 3, DP] bfloat16
    weight_ptr,  # [B, N] float32 or None
    edge_ptr,  # [B, Na] float32
    column_ptr,  # [B, Na] int32
    N,
    prefix,
    Na,
    Nb,
    power,
    POWER: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    blocks = tl.cdiv(Na, BM)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    a_n = b * N + prefix + prefix % 2 + 2 * i
    a_at = unit_ptr + a_n[:, None] * (3 * DP) + d[None, :]
    best = tl.full([BM], float("-inf"), tl.float32)
    column = tl.zeros([BM], tl.int32)
    for start in range(0, Nb, BN):
        j = start + tl.arange(0, BN)
        b_n = b * N + prefix + 1 - prefix % 2 + 2 * j
        b_at = unit_ptr + b_n[None, :] * (3 * DP) + d[:, None]
        score = _score_tile(a_at, b_at, i < Na, j < Nb, weight_ptr, a_n, b_n, power, POWER, DP, BD)
        score = tl.where((j < Nb)[None, :] & (score == score), score, float("-inf"))
        tile_best = tl.max(score, 1)
        tile_column = tl.min(tl.where(score == tile_best[:, None], j[None, :], 2147483647), 1)
        column = tl.where(tile_best > best, tile_column, column)
        best = tl.maximum(tile_best, best)
    tl.store(edge_ptr + b * Na + i, best, mask=i < Na)
    tl.store(column_ptr + b * Na + i, column, mask=i < Na)


@triton.jit(do_not_specialize=["N", "prefix", "Nk", "Nb"])
def back_kernel(
    unit_ptr,  # [B, N, 3, DP] bfloat16
    weight_ptr,  # [B, N] float32 or None
    kept_ptr,  # [B, Nk] int32: the a that stayed, ascending
    edge_ptr,  # [B, Nb] float32
    row_ptr,  # [B, Nb] int32: of the kept
    N,
    prefix,
    Nk,
    Nb,
    power,
    POWER: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    blocks = tl.cdiv(Nb, BN)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    b_n = b * N + prefix + 1 - prefix % 2 + 2 * j
    b_at = unit_ptr + b_n[None, :] * (3 * DP) + d[:, None]
    best = tl.full([BN], float("-inf"), tl.float32)
    row = tl.zeros([BN], tl.int32)
    for start in range(0, Nk, BM):
        c = start + tl.arange(0, BM)
        i = tl.load(kept_ptr + b * Nk + c, mask=c < Nk, other=0)
        a_n = b * N + prefix + prefix % 2 + 2 * i
        a_at = unit_ptr + a_n[:, None] * (3 * DP) + d[None, :]
        score = _score_tile(a_at, b_at, c < Nk, j < Nb, weight_ptr, a_n, b_n, power, POWER, DP, BD)
        score = tl.where((c < Nk)[:, None] & (score == score), score, float("-inf"))
        tile_best = tl.max(score, 0)
        tile_row = tl.min(tl.where(score == tile_best[None, :], c[:, None], 2147483647), 0)
        row = tl.where(tile_best > best, tile_row, row)
        best = tl.maximum(tile_best, best)
    tl.store(edge_ptr + b * Nb + j, best, mask=j < Nb)
    tl.store(row_ptr + b * Nb + j, row, mask=j < Nb)


@triton.jit
def _rank(edge_ptr, i, Na, BI: tl.constexpr, BO: tl.constexpr):
    """[BI] int32: how many rows come before row i: a better edge, or an equal one and a lower index."""
    edge = tl.load(edge_ptr + i, mask=i < Na, other=float("-inf"))
    before = tl.zeros([BI, BO], tl.int32)
    for start in range(0, Na, BO):
        o = start + tl.arange(0, BO)
        other = tl.load(edge_ptr + o, mask=o < Na, other=float("-inf"))[None, :]
        better = other > edge[:, None]
        tie = (other == edge[:, None]) & (o[None, :] < i[:, None])
        before += (better | tie).to(tl.int32)
    return tl.sum(before, 1)


@triton.jit(do_not_specialize=["Na"])
def rank_kernel(
    edge_ptr,  # [B, Na] float32
    rank_ptr,  # [B, Na] int32
    Na,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    blocks = tl.cdiv(Na, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    tl.store(rank_ptr + b * Na + i, _rank(edge_ptr + b * Na, i, Na, BI, BO), mask=i < Na)


@triton.jit(do_not_specialize=["N", "prefix", "Na", "Nb", "r"])
def assign_kernel(
    edge_ptr,  # [B, Na] float32
    column_ptr,  # [B, Na] int32
    rank_ptr,  # [B, Na] int32 or None: ranked here
    kept_ptr,  # [B, Na - r] int32 or None
    assign_ptr,  # [B, N] int32
    N,
    prefix,
    Na,
    Nb,
    r,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    assign_ptr += b * N
    first_b_row = prefix + Na - r
    lane = tl.arange(0, BI)
    for start in range(0, prefix, BI):
        tl.store(assign_ptr + start + lane, start + lane, mask=start + lane < prefix)
    kept_before = prefix
    for start in range(0, Na, BI):
        i = start + lane
        if rank_ptr is None:
            rank = _rank(edge_ptr + b * Na, i, Na, BI, BO)
        else:
            rank = tl.load(rank_ptr + b * Na + i, mask=i < Na, other=0)
        column = tl.load(column_ptr + b * Na + i, mask=i < Na, other=0)
        kept = ((rank >= r) & (i < Na)).to(tl.int32)
        row = tl.where(rank < r, first_b_row + column, kept_before + tl.cumsum(kept, 0) - 1)
        tl.store(assign_ptr + prefix + prefix % 2 + 2 * i, row, mask=i < Na)
        if kept_ptr is not None:
            tl.store(kept_ptr + b * (Na - r) + row - prefix, i, mask=kept != 0)
        kept_before += tl.sum(kept, 0)
    for start in range(0, Nb, BI):
        j = start + lane
        tl.store(assign_ptr + prefix + 1 - prefix % 2 + 2 * j, first_b_row + j, mask=j < Nb)


@triton.jit(do_not_specialize=["N", "prefix", "Nk", "Nb", "r_b"])
def follow_kernel(
    edge_ptr,  # [B, Nb] float32
    row_ptr,  # [B, Nb] int32
    assign_ptr,  # [B, N] int32: of the way from a to b; each entry is replaced by itself alone
    N,
    prefix,
    Nk,
    Nb,
    r_b,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    blocks = tl.cdiv(N - prefix, BI)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = prefix + tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    at = assign_ptr + b * N + n
    first_b_row = prefix + Nk
    j = tl.load(at, mask=n < N, other=0) - first_b_row
    in_b = (n < N) & (j >= 0)
    j = tl.where(in_b, j, Nb)
    rank = _rank(edge_ptr + b * Nb, j, Nb, BI, BO)
    into = tl.load(row_ptr + b * Nb + j, mask=in_b, other=0)
    tl.store(at, tl.where(rank < r_b, prefix + into, first_b_row + rank - r_b), mask=in_b)


def launch_match(
    metric: Tensor, r: int, prefix: int, weight: Tensor | None = None, power: float = 1.0, two_way: bool = False
) -> Tensor:
    """match for arguments that are checked."""
    metric = inner_contiguous(metric)
    B, N, D = metric.shape[0], *metric.shape[-2:]
    H, s_h = (metric.shape[1], metric.stride(1)) if metric.dim() == 4 else (1, 0)
    r = int(_check.clamp_r(r, N, prefix))
    assign = metric.new_empty(B, N, dtype=torch.int32)
    if assign.numel() == 0:
        return assign
    if r == 0:
        return assign.copy_(torch.arange(N, device=assign.device, dtype=torch.int32))
    weight = per_token(weight)
    Na = (N - prefix - prefix % 2 + 1) // 2
    Nb = N - prefix - Na
    DP = max(1, triton.cdiv(D, 64)) * 64
    chunk = min(1024, triton.next_power_of_2(DP))
    unit = metric.new_empty(B, N, 3, DP, dtype=torch.bfloat16)
    edge = metric.new_empty(B, Na, dtype=torch.float32)
    column = metric.new_empty(B, Na, dtype=torch.int32)
    r_a = r // 2 if two_way else r
    Nk = Na - r_a
    kept = metric.new_empty(B, Nk, dtype=torch.int32) if two_way else None
    rank = None if Na <= _RANKED_IN_ASSIGN else metric.new_empty(B, Na, dtype=torch.int32)
    with torch.cuda.device_of(metric):
        rows = max(1, 2048 // chunk)
        strides = metric.stride(0), s_h, metric.stride(-2)
        unit_kernel[(B * triton.cdiv(N, rows),)](metric, unit, H, N, *strides, D, DP, rows, chunk)
        BN = 64 if DP == 64 and weight is None else 32  # 64 columns and more to hold spill, on sm_80 or sm_100
        edges_kernel[(B * triton.cdiv(Na, 64),)](
            unit, weight, edge, column, N, prefix, Na, Nb, power, power != 1.0, DP, 64, BN, 64, num_stages=1
        )
        BI = min(_RANKED_IN_ASSIGN, max(64, triton.next_power_of_2(Na)))
        BO = 2048 // BI
        if rank is not None:
            rank_kernel[(B * triton.cdiv(Na, 128),)](edge, rank, Na, BI=128, BO=16)
        assign_kernel[(B,)](edge, column, rank, kept, assign, N, prefix, Na, Nb, r_a, BI=BI, BO=BO)
        if two_way:
            edge, row = metric.new_empty(B, Nb, dtype=torch.float32), metric.new_empty(B, Nb, dtype=torch.int32)
            back_kernel[(B * triton.cdiv(Nb, BN),)](
                unit, weight, kept, edge, row, N, prefix, Nk, Nb, power, power != 1.0, DP, 64, BN, 64, num_stages=1
            )
            follow_kernel[(B * triton.cdiv(N - prefix, 128),)](
                edge, row, assign, N, prefix, Nk, Nb, r - r_a, BI=128, BO=16
            )
    return assign


def match_triton(
    metric: Tensor,
    r: int,
    prefix: int = 1,
    weight: Tensor | None = None,
    *,
    power: float = 1.0,
    two_way: bool = False,
) -> Tensor:
    _check.match(metric, r, prefix, weight)
    refuse_float64("match", "metric", metric)
    return launch_match(metric, r, prefix, weight, power, two_way)
