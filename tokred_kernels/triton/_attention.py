"""What the attention kernels share: tiles, masks, products, and the scores from the columns of the matrix.

    s_ij = <q_i, k_j>;  c = scale log2 e;  shift_i = c max_j s_ij;  mass_ij = w_j 2^(c s_ij - shift_i);
    p_ij = mass_ij inverse_i,  inverse_i = 1 / sum_j mass_ij, 0 for a row without mass

w is the size, 0 for a masked key: a factor, for a logarithm per key and tile costs more than all other work on it. What
a masked key holds is never looked at: its logit is -inf whatever q k^T gave, its value is loaded as 0. Rows past the
last query repeat it with weight 0, because a row of zeros could meet an infinite key. Strides are in eights of
elements: what Triton knows to begin at 16 bytes it loads 16 bytes at a time, and one element at a time spills.

columns_kernel   BN keys of a head stay, the queries stream by: sum_i p_ij from the stored (shift, inverse) of the rows.
scores_kernel    adds the columns of all heads and query tiles of an image, in a fixed order.

Float32 products are 3xTF32 on NVIDIA, as in PyTorch's own float32 attention, and native on AMD.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _check

FLOAT32 = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


@triton.jit
def head_of_program(tiles, H):
    """(tile, b * H + h, b, h): the tiles of a head are neighbours, so that K and V stay in the L2."""
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    return tl.program_id(0) % tiles, bh, bh // H, bh % H


@triton.jit
def load_rows(ptr, n, keep, s_n, D: tl.constexpr, BD: tl.constexpr):
    """[BN, BD]: the rows n, 0 past D and, unless keep is None, where it is false."""
    d = tl.arange(0, BD)
    at = ptr + n.to(tl.int64)[:, None] * s_n * 8 + d[None, :]
    inside = (d < D)[None, :]
    if keep is not None:
        inside = inside & keep[:, None]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_heads(ptr, x, b, h, n, N, H, D: tl.constexpr, BD: tl.constexpr):
    """Rows n of a [B, N, H, D]."""
    d = tl.arange(0, BD)
    at = ptr + ((b * N + n[:, None]) * H + h) * D + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def load_weight(size_ptr, j, N, FULL: tl.constexpr):
    """w_j float32: 0 for masked keys and, unless the tile is known to be FULL, past N."""
    if size_ptr is None:
        return (j < N).to(tl.float32)
    elif FULL:
        size = tl.load(size_ptr + j)
        return tl.where(size > 0, size, 0.0)
    else:
        size = tl.load(size_ptr + j, mask=j < N, other=0.0)
        return tl.where(size > 0, size, 0.0)


@triton.jit
def mask_logits(s, w):
    """-inf where w is 0, even for NaN. A logit of NaN becomes +inf, and its row NaN all the same."""
    return tl.minimum(s, tl.where(w > 0, float("inf"), float("-inf")))


@triton.jit
def product(a, b, acc=None):
    """a b + acc."""
    return tl.dot(a.to(b.dtype), b, acc, input_precision=FLOAT32)


@triton.jit
def inverse(total):
    return tl.where(total == 0, 0.0, tl.div_rn(1.0, total))


@triton.jit
def online_step(s, w, c, shift, SIZED: tl.constexpr):
    """Masses of a tile of masked logits, the new shift and by what the sums so far shrink. The first shift is -inf."""
    new = tl.maximum(shift, tl.max(s, 1) * c)
    safe = tl.where(new == float("-inf"), 0.0, new)
    mass = tl.exp2(s * c - safe[:, None])
    if SIZED:
        mass *= w[None, :]
    return mass, new, tl.exp2(shift - safe)


@triton.jit
def store_row_sums(ptr, shift, total, i, Nq):
    """(shift, inverse) into a [2, Nq]."""
    tl.store(ptr + i, tl.where(shift == float("-inf"), 0.0, shift), mask=i < Nq)
    tl.store(ptr + Nq + i, inverse(total), mask=i < Nq)


@triton.jit(do_not_specialize=["Nq", "N", "counted"])
def columns_kernel(
    q_ptr,  # [B, H, Nq, D]
    k_ptr,  # [B, H, N, D]
    size_ptr,  # [B, N] float32 or None: 1
    row_ptr,  # [B, H, 2, Nq] float32: shift, inverse
    column_ptr,  # [B, H, N] float32
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
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile, bh, b, h = head_of_program(tl.cdiv(N, BN), H)
    q_ptr += (b * q_sb + h * q_sh) * 8
    row_ptr += bh * 2 * Nq
    if size_ptr is not None:
        size_ptr += b * N
    j = tile * BN + tl.arange(0, BN)
    w = load_weight(size_ptr, j, N, False)
    k = load_rows(k_ptr + (b * k_sb + h * k_sh) * 8, j, w > 0, k_sn, D, BD)
    column = tl.zeros([BN], tl.float32)
    for start in range(0, counted, BM):
        i = start + tl.arange(0, BM)
        row = tl.minimum(i, counted - 1)
        shift = tl.load(row_ptr + row)
        inv = tl.load(row_ptr + Nq + i, mask=i < counted, other=0.0)
        q = load_rows(q_ptr, row, None, q_sn, D, BD)
        s = mask_logits(product(k, tl.trans(q)), w[:, None])
        column += tl.sum(tl.exp2(s * c - shift[None, :]) * inv[None, :], 1)
    tl.store(column_ptr + bh * N + j, column * w, mask=j < N)


@triton.jit(do_not_specialize=["R", "N"])
def scores_kernel(
    column_ptr,  # [B, R, N] float32: the columns of every head, for each of its query tiles
    size_ptr,  # [B, N] float32 or None: 1
    scores_ptr,  # [B, N] float32
    share,
    R,
    N,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(N, BN)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        at = column_ptr + (b * R + r[:, None]) * N + j[None, :]
        total += tl.sum(tl.load(at, mask=(r < R)[:, None] & (j < N)[None, :], other=0.0), 0)
    keep = j < N
    if size_ptr is not None:
        keep = tl.load(size_ptr + b * N + j, mask=keep, other=0.0) > 0
    tl.store(scores_ptr + b * N + j, tl.where(keep, total * share, 0.0), mask=j < N)


def padded(D: int) -> int:
    """BD, the width of the tiles: a product needs a power of two, at least 16."""
    return max(16, triton.next_power_of_2(D))


def blocks(dtype: torch.dtype, D: int) -> tuple[int, int]:
    """(BM, BN) of a kernel that loops over keys with 4 warps: the largest with which no GPU spills."""
    if dtype != torch.float32:
        return 64, 64 if 32 < D <= 64 else 32
    return 16, 32 if 32 < D <= 64 else 16


def exponent(scale: float | None, D: int) -> float:
    """c of a scale >= 0. For 0 the least that float32 has to nine digits, which keeps logits equal: -inf * 0 is NaN."""
    return max(_check.scale(scale, D) * math.log2(math.e), 1e-37)


def vectors(t: Tensor) -> Tensor:
    """t, or one contiguous copy where rows are not contiguous, not aligned to 16 bytes, or not whole eights apart."""
    eights = all(stride % 8 == 0 or n <= 1 for stride, n in zip(t.stride()[:3], t.shape[:3], strict=True))
    if eights and t.stride(3) == 1 and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def in_eights(*tensors: Tensor | None) -> list[int]:
    """The strides of batch, head and row of each, as the kernels take them."""
    return [stride // 8 for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]


def launch_columns(q: Tensor, k: Tensor, size: Tensor | None, row: Tensor, c: float) -> Tensor:
    """[B, H, 1, N]: the columns of p, added over the rows of q, the first of those that `row` describes."""
    B, H, counted, D = q.shape
    N, Nq = k.shape[2], row.shape[3]
    column = q.new_empty(B, H, 1, N, dtype=torch.float32)
    BM, BN = blocks(q.dtype, D)
    columns_kernel[(B * H * triton.cdiv(N, BN),)](
        q, k, size, row, column, c, H, Nq, N, counted, *in_eights(q, k), D, padded(D), BM, BN
    )
    return column


def launch_scores(column: Tensor, size: Tensor | None, rows: int) -> Tensor:
    """[B, N]: the mean over heads and `rows` queries of columns [B, H, tiles, N]."""
    B, H, tiles, N = column.shape
    scores = column.new_empty(B, N)
    grid = (B * triton.cdiv(N, 64),)
    scores_kernel[grid](column, size, scores, 1 / (H * rows), H * tiles, N, BR=16, BN=64)
    return scores
