"""attention: softmax(c q k^T) v with sizes as factors, and the columns of its matrix as a by-product.

    out_i = sum_j p_ij v_j;   "cls": scores_j = 1/H sum_h p_h0j;   "mean": scores_j = 1/(H Nq) sum_hi p_hij

p and its terms: _attention.py.

attention_row_kernel      N <= _ONE_PASS, half precision, D 16, 32 or 64. 64 queries of a head with all of their logits
                          in the registers: one pass, exact probabilities. Its tiles of keys are uneven powers of two,
                          224 keys in all for N = 197 and not 256. The sum of each column over the 64 queries is stored:
                          partials [B, H, ceil(Nq / 64), N], which scores_kernel adds.
attention_online_kernel   otherwise. BM queries of a head over tiles of BN keys. The running output is normalised at
                          every tile, so that p <= 1 whatever the sizes: float16 would overflow at 65504. It stores
                          (shift, inverse) of every row if scores are asked for, and columns_kernel forms the columns.

Floor, DeiT-S B=256 H=6 N=197 D=64 bfloat16 on an H200: q, k, v and out once, 154.9 MB = 36 us; 15.3 GFLOP = 19 us.

    sm_90, D = 64, half precision     registers   shared memory
    attention_row_kernel, N = 197     222 - 255           25 KB
    attention_online_kernel           110 - 146      41 - 57 KB
    columns_kernel                      80 - 88           33 KB

Not timed. Nothing spills on sm_80, sm_90, sm_100 or gfx942.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check
from ._attention import (
    blocks,
    exponent,
    head_of_program,
    in_eights,
    inverse,
    launch_columns,
    launch_scores,
    load_rows,
    load_weight,
    mask_logits,
    online_step,
    padded,
    product,
    store_heads,
    store_row_sums,
    vectors,
)
from ._launch import per_token, refuse_float64

_ONE_PASS = 224  # keys, the most whose logits for 64 queries fit the registers of every GPU


@triton.jit(do_not_specialize=["Nq", "N", "counted"])
def attention_row_kernel(
    q_ptr,  # [B, H, Nq, D]
    k_ptr,  # [B, H, N, D]
    v_ptr,  # [B, H, N, D] or None: only the columns
    size_ptr,  # [B, N] float32 or None: 1
    out_ptr,  # [B, Nq, H, D] or None
    column_ptr,  # [B, H, ceil(counted / BM), N] float32 or None: sums over the first `counted` queries
    c,
    H,
    Nq,
    N,
    counted,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,
):
    tile, bh, b, h = head_of_program(tl.cdiv(Nq, BM), H)
    k_ptr += (b * k_sb + h * k_sh) * 8
    if size_ptr is not None:
        size_ptr += b * N
    i = tile * BM + tl.arange(0, BM)
    q = load_rows(q_ptr + (b * q_sb + h * q_sh) * 8, i, i < Nq, q_sn, D, BD)
    last: tl.constexpr = len(TILES) - 1  # the only tile that may reach past N
    highest = tl.full([BM], float("-inf"), tl.float32)
    logits = ()
    first: tl.constexpr = 0
    for t in tl.static_range(len(TILES)):
        j = first + tl.arange(0, TILES[t])
        # Keys are not masked by size here: their loads would wait for its load.
        k = load_rows(k_ptr, j, None if t < last else j < N, k_sn, D, BD)
        s = product(q, tl.trans(k))
        if size_ptr is not None or t == last:
            s = mask_logits(s, load_weight(size_ptr, j, N, t < last)[None, :])
        highest = tl.maximum(highest, tl.max(s, 1))
        logits += (s,)
        first = first + TILES[t]
    shift = tl.where(highest == float("-inf"), 0.0, highest * c)
    total = tl.zeros([BM], tl.float32)
    masses = ()
    first = 0
    for t in tl.static_range(len(TILES)):
        mass = tl.exp2(logits[t] * c - shift[:, None])
        if size_ptr is not None:
            mass *= load_weight(size_ptr, first + tl.arange(0, TILES[t]), N, t < last)[None, :]
        total += tl.sum(mass, 1)
        masses += (mass,)
        first = first + TILES[t]
    inv = inverse(total)[:, None]
    acc = tl.zeros([BM, BD], tl.float32)
    first = 0
    for t in tl.static_range(len(TILES)):
        j = first + tl.arange(0, TILES[t])
        p = masses[t] * inv
        if column_ptr is not None:
            counts = (i < counted)[:, None]
            if tile * BM < counted:
                column = tl.sum(tl.where(counts, p, 0.0), 0)
                tl.store(column_ptr + (bh * tl.cdiv(counted, BM) + tile) * N + j, column, mask=j < N)
        if v_ptr is not None:
            keep = None if size_ptr is None and t < last else load_weight(size_ptr, j, N, t < last) > 0
            acc = product(p, load_rows(v_ptr + (b * v_sb + h * v_sh) * 8, j, keep, v_sn, D, BD), acc)
        first = first + TILES[t]
    if v_ptr is not None:
        store_heads(out_ptr, acc, b, h, i, Nq, H, D, BD)


@triton.jit(do_not_specialize=["Nq", "N"])
def attention_online_kernel(
    q_ptr,  # [B, H, Nq, D]
    k_ptr,  # [B, H, N, D]
    v_ptr,  # [B, H, N, D] or None: only the sums of the rows
    size_ptr,  # [B, N] float32 or None: 1
    out_ptr,  # [B, Nq, H, D] or None
    row_ptr,  # [B, H, 2, Nq] float32 or None: shift, inverse
    c,
    H,
    Nq,
    N,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile, bh, b, h = head_of_program(tl.cdiv(Nq, BM), H)
    k_ptr += (b * k_sb + h * k_sh) * 8
    if v_ptr is not None:
        v_ptr += (b * v_sb + h * v_sh) * 8
    if size_ptr is not None:
        size_ptr += b * N
    i = tile * BM + tl.arange(0, BM)
    q = load_rows(q_ptr + (b * q_sb + h * q_sh) * 8, tl.minimum(i, Nq - 1), None, q_sn, D, BD)
    shift = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, N, BN):
        j = start + tl.arange(0, BN)
        k = load_rows(k_ptr, j, j < N, k_sn, D, BD)
        w = load_weight(size_ptr, j, N, False)
        s = mask_logits(product(q, tl.trans(k)), w[None, :])
        mass, shift, fade = online_step(s, w, c, shift, size_ptr is not None)
        before = total * fade
        total = before + tl.sum(mass, 1)
        if v_ptr is not None:
            inv = inverse(total)
            v = load_rows(v_ptr, j, w > 0, v_sn, D, BD)
            acc = product(mass * inv[:, None], v, acc * (before * inv)[:, None])
    if v_ptr is not None:
        store_heads(out_ptr, acc, b, h, i, Nq, H, D, BD)
    if row_ptr is not None:
        store_row_sums(row_ptr + bh * 2 * Nq, shift, total, i, Nq)


def _query_rows(device: torch.device) -> int:
    """BM of attention_row_kernel. 64 are a wgmma's; with them sm_100 takes tcgen05, whose results give a thread half a
    row, and each would hold 112 sizes besides."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 10:
        return 32
    return 64


def _key_tiles(N: int, values: bool) -> tuple[int, ...]:
    """Powers of two that cover N keys with less than 32 to spare, in the order in which no GPU spills."""
    tiles = {1: (32,), 2: (64,), 3: (64, 32), 4: (128,), 5: (128, 32), 6: (32, 128, 32), 7: (128, 64, 32)}
    return (64, 128, 32) if values and N > 192 else tiles[triton.cdiv(N, 32)]


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor | None, size: Tensor | None, scale: float | None, scores: str
) -> tuple[Tensor | None, Tensor]:
    """attention for arguments that are checked; without v, only its scores."""
    B, H, Nq, D = q.shape
    N = k.shape[2]
    out = None if v is None else q.new_empty(B, Nq, H, D)
    if B * Nq * N == 0 or (D == 0 and scores == "none"):
        zeros = q.new_zeros(B, 0 if scores == "none" else N, dtype=torch.float32)
        return None if out is None else out.zero_().transpose(1, 2), zeros
    scale = _check.scale(scale, D)
    if scale < 0:  # the highest logit of a row is that of the highest product only for a scale >= 0
        q, scale = -q, -scale
    q, k, v = vectors(q), vectors(k), None if v is None else vectors(v)
    size, c, strides = per_token(size), exponent(scale, D), in_eights(q, k, v)
    column = row = None
    counted = 1 if scores == "cls" else Nq
    with torch.cuda.device_of(q):
        rows = _query_rows(q.device)
        tiles = triton.cdiv(counted, rows)
        # Partial columns may take no more memory than the columns of 64 queries each and two floats a row.
        affordable = scores == "none" or tiles * N <= triton.cdiv(N, 64) * N + 2 * Nq
        if q.dtype != torch.float32 and D == padded(D) <= 64 and N <= _ONE_PASS and affordable:
            if scores != "none":
                column = q.new_empty(B, H, tiles, N, dtype=torch.float32)
            of_keys = _key_tiles(N, v is not None)
            attention_row_kernel[(B * H * triton.cdiv(Nq, rows),)](
                q, k, v, size, out, column, c, H, Nq, N, counted, *strides, D, padded(D), rows, of_keys
            )
        else:
            BM, BN = blocks(q.dtype, D)
            if scores != "none":
                row = q.new_empty(B, H, 2, Nq, dtype=torch.float32)
            attention_online_kernel[(B * H * triton.cdiv(Nq, BM),)](
                q, k, v, size, out, row, c, H, Nq, N, *strides, D, padded(D), BM, BN
            )
            if row is not None:
                column = launch_columns(q[:, :, :counted], k, size, row, c)
        emitted = q.new_empty(B, 0, dtype=torch.float32) if column is None else launch_scores(column, size, counted)
    return None if out is None else out.transpose(1, 2), emitted


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, scale: float | None = None, scores: str = "none"
) -> tuple[Tensor, Tensor]:
    _check.attention("attention", q, k, v, size, scores)
    refuse_float64("attention", "q", q)
    return launch_attention(q, k, v, size, scale, scores)
