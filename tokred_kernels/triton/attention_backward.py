"""attention_backward: the gradients of out and scores, from p recomputed tile by tile.

    g_ij = grad_scores_j / H in row 0 ("cls"), / (H Nq) in every row ("mean")
    dP   = dO v^T + g;   delta_i = sum_j p_ij dP_ij = <dO_i, out_i> + sum_j p_ij g_ij;   dS = p (dP - delta)
    dq   = scale dS k;   dk = scale dS^T q;   dv = p^T dO

p and its terms: _attention.py. Three kernels, no atomics, each sum in one program and in order:

rows_kernel      BM queries of a head over all keys: (shift, inverse, delta) of the rows.
queries_kernel   BM queries of a head over all keys: dq.
keys_kernel      BN keys of a head over all queries: dk, dv. Its matrices are transposed, so that they are what the
                 second products take as they are.

Float16 has too few exponents for p and dS. Their products with float16 are TF32, which holds a float16 exactly.

Floor, DeiT-S B=256 H=6 N=197 D=64 bfloat16 on an H200: eight tensors of 38.7 MB once, 310 MB = 72 us.
Nine products of 7.6 GFLOP, one of them by rows_kernel, instead of the five that storing p would leave: 87 us.

    sm_90, D = 64, half precision     registers   shared memory
    rows_kernel                        64 - 109           33 KB
    queries_kernel                    129 - 196      49 - 58 KB
    keys_kernel                       152 - 168           33 KB

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


@triton.jit
def _load_grad(g_ptr, w, j, share):
    return tl.load(g_ptr + j, mask=w > 0, other=0.0) * share


@triton.jit
def _product_with_gradient(a, b, acc):
    """a b + acc for a float32 whose exponents float16 does not have."""
    if b.dtype == tl.float16:
        return tl.dot(a, b.to(tl.float32), acc, input_precision="tf32")
    else:
        return product(a, b, acc)


@triton.jit(do_not_specialize=["Nq", "N"])
def rows_kernel(
    q_ptr,  # [B, H, Nq, D]
    k_ptr,  # [B, H, N, D]
    size_ptr,  # [B, N] float32 or None: 1
    out_ptr,  # [B, H, Nq, D]
    do_ptr,  # [B, H, Nq, D] or None: 0
    g_ptr,  # [B, N] float32 or None: 0
    row_ptr,  # [B, H, 3, Nq] float32: shift, inverse, delta
    c,
    share,
    H,
    Nq,
    N,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    out_sb,
    out_sh,
    out_sn,
    do_sb,
    do_sh,
    do_sn,
    CLS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile, bh, b, h = head_of_program(tl.cdiv(Nq, BM), H)
    k_ptr += (b * k_sb + h * k_sh) * 8
    row_ptr += bh * 3 * Nq
    if size_ptr is not None:
        size_ptr += b * N
    if g_ptr is not None:
        g_ptr += b * N
    i = tile * BM + tl.arange(0, BM)
    q = load_rows(q_ptr + (b * q_sb + h * q_sh) * 8, i, i < Nq, q_sn, D, BD)
    shift = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    weighted = tl.zeros([BM], tl.float32)
    for start in range(0, N, BN):
        j = start + tl.arange(0, BN)
        w = load_weight(size_ptr, j, N, False)
        s = mask_logits(product(q, tl.trans(load_rows(k_ptr, j, j < N, k_sn, D, BD))), w[None, :])
        mass, shift, fade = online_step(s, w, c, shift, size_ptr is not None)
        total = total * fade + tl.sum(mass, 1)
        if g_ptr is not None:
            weighted = weighted * fade + tl.sum(mass * _load_grad(g_ptr, w, j, share)[None, :], 1)
    delta = weighted * inverse(total)
    if CLS:
        delta = tl.where(i == 0, delta, 0.0)
    if do_ptr is not None:
        out = load_rows(out_ptr + (b * out_sb + h * out_sh) * 8, i, i < Nq, out_sn, D, BD).to(tl.float32)
        delta += tl.sum(
            load_rows(do_ptr + (b * do_sb + h * do_sh) * 8, i, i < Nq, do_sn, D, BD).to(tl.float32) * out, 1
        )
    store_row_sums(row_ptr, shift, total, i, Nq)
    tl.store(row_ptr + 2 * Nq + i, delta, mask=i < Nq)


@triton.jit(do_not_specialize=["Nq", "N"])
def queries_kernel(
    q_ptr,  # [B, H, Nq, D]
    k_ptr,  # [B, H, N, D]
    v_ptr,  # [B, H, N, D]
    size_ptr,  # [B, N] float32 or None: 1
    do_ptr,  # [B, H, Nq, D] or None: 0
    g_ptr,  # [B, N] float32 or None: 0
    row_ptr,  # [B, H, 3, Nq] float32: shift, inverse, delta
    dq_ptr,  # [B, Nq, H, D]
    c,
    scale,
    share,
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
    do_sb,
    do_sh,
    do_sn,
    CLS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile, bh, b, h = head_of_program(tl.cdiv(Nq, BM), H)
    k_ptr += (b * k_sb + h * k_sh) * 8
    v_ptr += (b * v_sb + h * v_sh) * 8
    row_ptr += bh * 3 * Nq
    if size_ptr is not None:
        size_ptr += b * N
    if g_ptr is not None:
        g_ptr += b * N
    i = tile * BM + tl.arange(0, BM)
    q = load_rows(q_ptr + (b * q_sb + h * q_sh) * 8, i, i < Nq, q_sn, D, BD)
    if do_ptr is not None:
        do = load_rows(do_ptr + (b * do_sb + h * do_sh) * 8, i, i < Nq, do_sn, D, BD)
    shift = tl.load(row_ptr + i, mask=i < Nq, other=0.0)[:, None]
    inv = tl.load(row_ptr + Nq + i, mask=i < Nq, other=0.0)[:, None]
    delta = tl.load(row_ptr + 2 * Nq + i, mask=i < Nq, other=0.0)[:, None]
    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(0, N, BN):
        j = start + tl.arange(0, BN)
        w = load_weight(size_ptr, j, N, False)
        k = load_rows(k_ptr, j, w > 0, k_sn, D, BD)
        s = mask_logits(product(q, tl.trans(k)), w[None, :])
        p = tl.exp2(s * c - shift) * inv * w[None, :]
        dp = tl.zeros([BM, BN], tl.float32)
        if do_ptr is not None:
            dp = product(do, tl.trans(load_rows(v_ptr, j, w > 0, v_sn, D, BD)))
        if g_ptr is not None:
            g = _load_grad(g_ptr, w, j, share)[None, :]
            dp += tl.where((i == 0)[:, None], g, 0.0) if CLS else g
        dq = _product_with_gradient(p * (dp - delta), k, dq)
    store_heads(dq_ptr, dq * scale, b, h, i, Nq, H, D, BD)


@triton.jit(do_not_specialize=["Nq", "N"])
def keys_kernel(
    q_ptr,  # [B, H, Nq, D]
    k_ptr,  # [B, H, N, D]
    v_ptr,  # [B, H, N, D]
    size_ptr,  # [B, N] float32 or None: 1
    do_ptr,  # [B, H, Nq, D] or None: 0
    g_ptr,  # [B, N] float32 or None: 0
    row_ptr,  # [B, H, 3, Nq] float32: shift, inverse, delta
    dk_ptr,  # [B, N, H, D]
    dv_ptr,  # [B, N, H, D]
    c,
    scale,
    share,
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
    do_sb,
    do_sh,
    do_sn,
    CLS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile, bh, b, h = head_of_program(tl.cdiv(N, BN), H)
    q_ptr += (b * q_sb + h * q_sh) * 8
    row_ptr += bh * 3 * Nq
    if size_ptr is not None:
        size_ptr += b * N
    if do_ptr is not None:
        do_ptr += (b * do_sb + h * do_sh) * 8
    j = tile * BN + tl.arange(0, BN)
    w = load_weight(size_ptr, j, N, False)
    keep = (w > 0)[:, None]
    k = load_rows(k_ptr + (b * k_sb + h * k_sh) * 8, j, w > 0, k_sn, D, BD)
    v = load_rows(v_ptr + (b * v_sb + h * v_sh) * 8, j, w > 0, v_sn, D, BD)
    if g_ptr is not None:
        g = _load_grad(g_ptr + b * N, w, j, share)[:, None]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for start in range(0, Nq, BM):
        i = start + tl.arange(0, BM)
        row = tl.minimum(i, Nq - 1)
        shift = tl.load(row_ptr + row)[None, :]
        inv = tl.load(row_ptr + Nq + i, mask=i < Nq, other=0.0)[None, :]
        delta = tl.load(row_ptr + 2 * Nq + row)[None, :]
        q = load_rows(q_ptr, row, None, q_sn, D, BD)
        s = mask_logits(product(k, tl.trans(q)), w[:, None])
        p = tl.exp2(s * c - shift) * inv * w[:, None]
        dp = tl.zeros([BN, BM], tl.float32)
        if do_ptr is not None:
            do = load_rows(do_ptr, row, None, do_sn, D, BD)
            dv = _product_with_gradient(p, do, dv)
            dp = product(v, tl.trans(do))
        if g_ptr is not None:
            dp += tl.where((i == 0)[None, :], g, 0.0) if CLS else g
        dk = _product_with_gradient(p * (dp - delta), q, dk)
    store_heads(dk_ptr, tl.where(keep, dk * scale, 0.0), b, h, j, N, H, D, BD)
    store_heads(dv_ptr, tl.where(keep, dv, 0.0), b, h, j, N, H, D, BD)


def attention_backward_triton(
    grad_out: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    scores: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    _check.attention_backward(grad_out, grad_scores, q, k, v, out, size, scores)
    refuse_float64("attention_backward", "q", q)
    B, H, Nq, D = q.shape
    N = k.shape[2]
    g = None if scores == "none" else per_token(grad_scores)
    grads = [q.new_empty(B, n, H, D) for n in (Nq, N, N)]
    if q.numel() == 0 or k.numel() == 0 or (grad_out is None and g is None):
        return tuple(t.zero_().transpose(1, 2) for t in grads)
    dq, dk, dv = grads
    signed = scale = _check.scale(scale, D)
    if scale < 0:  # as in attention; dk has both signs turned round, dq one
        q, scale = -q, -scale
    size, c = per_token(size), exponent(scale, D)
    q, k, v, out = (vectors(t) for t in (q, k, v, out))
    do = None if grad_out is None else vectors(grad_out)
    share = 1 / H if scores == "cls" else 1 / (H * Nq)
    row = q.new_empty(B, H, 3, Nq, dtype=torch.float32)
    strides, rows_strides = in_eights(q, k, v, do), in_eights(q, k, out, do)
    shape = scores == "cls", D, padded(D)
    half = q.dtype != torch.float32
    BM, BN = blocks(q.dtype, D)
    # What no GPU spills. dk and dv take twice the registers of dq, the parts of 3xTF32 three times those of an operand.
    keys_BM = 32 if half else BM
    queries_stages, keys_stages = (2, 1) if not half else (2, 2) if D <= 64 else (1, 1)
    num_warps = 4 if half or D <= 64 else 8
    of_queries, of_keys = (B * H * triton.cdiv(Nq, BM),), (B * H * triton.cdiv(N, BN),)
    with torch.cuda.device_of(q):
        rows_BN = 64 if half else BN
        rows_kernel[of_queries](q, k, size, out, do, g, row, c, share, H, Nq, N, *rows_strides, *shape, BM, rows_BN)
        arguments = c, signed, share, H, Nq, N, *strides, *shape
        queries_kernel[of_queries](
            q, k, v, size, do, g, row, dq, *arguments, BM, BN, num_warps=num_warps, num_stages=queries_stages
        )
        arguments = c, scale, share, H, Nq, N, *strides, *shape
        keys_kernel[of_keys](
            q, k, v, size, do, g, row, dk, dv, *arguments, keys_BM, BN, num_warps=num_warps, num_stages=keys_stages
        )
    return tuple(t.transpose(1, 2) for t in grads)
