"""The ops of csrc/cuda on the emulator, with the reference's signatures: what csrc/cuda/*.cpp does, for CPU tensors.

Outputs lie between guard bands and start as NaN or the largest integer, so a write beside them or a value never written
shows.
"""

import math
import struct

import torch
from torch import Tensor

from tokred_kernels import _check

from .build import emulator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of Dtype
SCORES = ["none", "cls", "mean"]  # in the order of Emission
REDUCE = ["mean", "sum", "amax"]  # in the order of Reduction
H200 = (132, 227 << 10)  # multiprocessors, shared memory of a block
_GUARD = 64


class _Output:
    """A poisoned tensor with guard bands of a sentinel on both sides."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self._sentinel = -77
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        count = torch.Size(shape).numel()
        self._all = torch.full((count + 2 * _GUARD,), self._sentinel, dtype=dtype)
        self._inside = self._all[_GUARD : _GUARD + count]
        self.tensor = self._inside.fill_(poison).view(shape)

    def take(self) -> Tensor:
        for band in (self._all[:_GUARD], self._all[-_GUARD:]):
            assert (band == self._sentinel).all(), "written beside the output"
        return self.tensor


def _inner_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _per_token(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _aligned(t: Tensor, strides: list[int]) -> bool:
    return t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in strides)


def match(metric: Tensor, r: int, prefix: int = 1, weight: Tensor | None = None, **kwargs) -> Tensor:
    return match_edges(metric, r, prefix, weight, **kwargs)[0]


def match_edges(
    metric: Tensor, r: int, prefix: int = 1, weight: Tensor | None = None, *, power: float = 1.0,
    two_way: bool = False, device=H200, seed=0,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """(assign, the best score of every row a of the batch), the latter only from the kernels of several blocks."""
    keys = []
    B, N, D = metric.shape[0], metric.shape[-2], metric.shape[-1]
    H = metric.shape[1] if metric.dim() == 4 else 1
    assign = _Output((B, N), torch.int32)
    metric, weight = _inner_contiguous(metric), _per_token(weight)
    strides = [metric.stride(0), metric.stride(1) if metric.dim() == 4 else 0, metric.stride(-2)]
    if B and N:
        r = _check.clamp_r(r, N, prefix)
        r_a = r // 2 if two_way else r
        emulator().seed(seed)
        keys = emulator().match(
            _address(metric), _address(weight), _address(assign.tensor), B, H, N, D, *strides,
            r_a, r - r_a, prefix, power, DTYPES.index(metric.dtype), _aligned(metric, strides), *device,
        )  # fmt: skip
    return assign.take(), [_score(key >> 32) for key in keys]


def _score(ordered: int) -> float:
    """Undoes the order-preserving map of floats to unsigned integers."""
    bits = ordered & 0x7FFFFFFF if ordered >> 31 else ~ordered & 0xFFFFFFFF
    return struct.unpack("f", struct.pack("I", bits))[0]


def _tail(x: Tensor, m: int, tail: tuple | None) -> tuple[tuple | None, bool, "_Output | None"]:
    """From (branch, norm_weight, norm_bias, branch_scale, branch_bias, eps): what the kernel takes, whether it is
    aligned, and normed."""
    if tail is None:
        return None, True, None
    branch, *rows, eps = tail
    branch, normed = _inner_contiguous(branch), _Output((x.shape[0], m, x.shape[2]), x.dtype)
    wide = any(t is not None and t.dtype != x.dtype for t in rows)
    rows = [None if t is None else t.float() if wide else t for t in rows]
    aligned = _aligned(branch, [branch.stride(0), branch.stride(1)]) and _aligned(normed.tensor, [])
    aligned &= all(t is None or _aligned(t, []) for t in rows)
    _alive.extend((branch, *rows))
    addresses = map(_address, (branch, normed.tensor, *rows))
    return (*addresses, branch.stride(0), branch.stride(1), wide, eps), aligned, normed


_alive: list = []  # tensors that a pending launch points to


def add_merge_norm(
    x, branch, assign, m, norm_weight, norm_bias, size=None, branch_scale=None, branch_bias=None, *, eps=1e-6, seed=0
):
    tail = (branch, norm_weight, norm_bias, branch_scale, branch_bias, eps)
    return merge(x, assign, m, size, tail=tail, seed=seed)


def add_topk_gather_norm(
    x, branch, score, k, norm_weight, norm_bias, prefix=1, branch_scale=None, branch_bias=None, *, fuse="none",
    eps=1e-6, seed=0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tail = (branch, norm_weight, norm_bias, branch_scale, branch_bias, eps)
    return topk_gather(x, score, k, prefix, fuse=fuse, tail=tail, seed=seed)


def merge(
    x: Tensor, assign: Tensor, m: int, size=None, weight=None, *, reduce: str = "mean", tail=None,
    after_match=False, seed=0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(out, size_out), and normed with a tail."""
    B, N, C = x.shape
    tail, tail_aligned, normed = _tail(x, m, tail)
    out, size_out = _Output((B, m, C), x.dtype), _Output((B, m), torch.float32)
    x, assign, size, weight = _inner_contiguous(x), assign.contiguous(), _per_token(size), _per_token(weight)
    if reduce == "amax":
        weight = None
    if B and m:
        emulator().seed(seed)
        aligned = _aligned(x, [x.stride(0), x.stride(1), C]) and _aligned(out.tensor, [C])
        emulator().merge(
            _address(x), _address(assign), _address(size), _address(weight), _address(out.tensor),
            _address(size_out.tensor), B, N, m, C, x.stride(0), x.stride(1), REDUCE.index(reduce),
            DTYPES.index(x.dtype), aligned and tail_aligned, after_match, tail,
        )  # fmt: skip
    _alive.clear()
    return out.take(), size_out.take(), *([normed.take()] if normed else [])


def unmerge(y: Tensor, assign: Tensor, *, seed=0) -> Tensor:
    B, M, C = y.shape
    N = assign.shape[1]
    x = _Output((B, N, C), y.dtype)
    y, assign = _inner_contiguous(y), assign.contiguous()
    if B and N and C:
        aligned = _aligned(y, [y.stride(0), y.stride(1), C]) and _aligned(x.tensor, [C])
        word = 16 if aligned else y.element_size()
        per = word // y.element_size()
        emulator().seed(seed)
        getattr(emulator(), f"unmerge_{word}")(
            _address(y), _address(assign), _address(x.tensor), B, N, M, C // per, y.stride(0) // per,
            y.stride(1) // per,
        )  # fmt: skip
    return x.take()


def match_merge(x: Tensor, metric: Tensor, r: int, prefix: int = 1, size: Tensor | None = None, *, device=H200, seed=0):
    N = x.shape[1]
    assign = match(metric, r, prefix, device=device, seed=seed)
    out, size_out = merge(x, assign, N - _check.clamp_r(r, N, prefix), size, after_match=True, seed=seed)
    return out, size_out, assign


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, scale: float | None = None, scores: str = "none",
    device=H200, seed=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attention_and_scratch(q, k, v, size, scale, scores, device, seed)[:2]


def attention_scores(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, scores: str = "cls", device=H200,
    seed=0,
) -> Tensor:  # fmt: skip
    return attention_and_scratch(q, k, None, size, scale, scores, device, seed)[1]


def attention_and_scratch(
    q, k, v, size=None, scale=None, scores="none", device=H200, seed=0
) -> tuple[Tensor | None, Tensor, int]:
    """(out, scores, bytes of scratch memory); without v, scores alone."""
    B, H, Nq, D = q.shape
    N = k.shape[2]
    out = None if v is None else _Output((B, Nq, H, D), q.dtype)
    emitted = _Output((B, 0 if scores == "none" else N), torch.float32)
    q, k, size = _inner_contiguous(q), _inner_contiguous(k), _per_token(size)
    v = k if v is None else _inner_contiguous(v)
    scale = _check.scale(scale, D)
    scratch = 0
    if B:
        emulator().seed(seed)
        scratch = emulator().attention(
            _address(q), _address(k), _address(v), _address(size), _address(out and out.tensor),
            _address(emitted.tensor), B, H, Nq, N, D, [s for t in (q, k, v) for s in t.stride()[:3]],
            max(abs(scale) * math.log2(math.e), torch.finfo(torch.float32).tiny), scale < 0, SCORES.index(scores),
            DTYPES.index(q.dtype), all(_aligned(t, t.stride()[:3]) for t in (q, k, v)), device[0],
        )  # fmt: skip
    return out and out.take().transpose(1, 2), emitted.take(), scratch


def topk(score: Tensor, k: int, prefix: int = 1, fuse: bool = False, *, seed=0) -> Tensor:
    B, N = score.shape
    k, assign, score = min(k, N - prefix), _Output((B, N), torch.int32), _per_token(score)
    if B and N:
        emulator().seed(seed)
        others = prefix + k if fuse and k < N - prefix else -1
        emulator().topk(_address(score), _address(assign.tensor), B, N, k, prefix, others)
    return assign.take()


def topk_gather(x: Tensor, score: Tensor, k: int, prefix: int = 1, *, fuse: str = "none", tail=None, seed=0):
    """(out, assign), and normed with a tail."""
    B, N, C = x.shape
    assign = topk(score, k, prefix, fuse != "none", seed=seed)
    k = min(k, N - prefix)
    fused = fuse != "none" and k < N - prefix
    M = prefix + k + fused
    copied = prefix + k if fused and (fuse == "sum" or M < N) else M
    out = _Output((B, M, C), x.dtype)
    tail, tail_aligned, normed = _tail(x, M, tail)
    x, score = _inner_contiguous(x), _per_token(score)
    if B and N and C:
        strides = [x.stride(0), x.stride(1)]
        aligned = _aligned(x, [*strides, C]) and _aligned(out.tensor, [C])
        emulator().gather(
            _address(x), _address(score), _address(assign), _address(out.tensor), B, N, M, C, *strides, copied,
            fuse == "mean" and copied < M, DTYPES.index(x.dtype), aligned and tail_aligned, tail,
        )  # fmt: skip
    _alive.clear()
    return out.take(), assign, *([normed.take()] if normed else [])
