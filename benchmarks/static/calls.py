"""The calls that the tables hold: every op at the shapes that matter, with the bytes and FLOPs it cannot do without."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from tokred_kernels import reference

D, R, KEEP = 64, 13, 0.7


@dataclass(frozen=True)
class Shape:
    """Tokens of a DeiT: H heads of D = 64."""

    B: int
    N: int
    H: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def id(self) -> str:
        return f"B{self.B}-N{self.N}-H{self.H}-{str(self.dtype).removeprefix('torch.')}"


SHAPES = (
    Shape(64, 197, 6),
    Shape(64, 197, 6, torch.float16),
    Shape(64, 197, 6, torch.float32),
    Shape(64, 197, 12),
    Shape(1, 197, 6),
    Shape(8, 577, 6),
    Shape(8, 1024, 6),
    Shape(2, 4096, 6),
)


@dataclass(frozen=True)
class Call:
    op: str
    form: str
    shape: Shape
    args: tuple
    kwargs: dict = field(default_factory=dict)
    floor: int = 0  # bytes: every input and output once
    flops: int = 0
    parts: int = 1  # equal parts of the work that read and write nothing in common

    @property
    def id(self) -> tuple[str, str, str]:
        return self.op, self.form, self.shape.id


def _reduction(s: Shape, call: Callable) -> Iterator[Call]:
    B, N, C, e = s.B, s.N, s.H * D, s.dtype.itemsize
    M, k = N - R, math.ceil(KEEP * (N - 1))
    x, branch = torch.zeros(2, B, N, C, dtype=s.dtype)
    affine = torch.ones(2, C, dtype=s.dtype)
    keys = torch.zeros(B, N, 3, s.H, D, dtype=s.dtype)[:, :, 1].transpose(1, 2)
    tokens = torch.randn(1, N, 8, generator=torch.Generator().manual_seed(0))
    assign = reference.match(tokens, R).expand(B, N).contiguous()
    size, score = torch.ones(B, N), tokens[..., 0].expand(B, N).contiguous()
    row, per_token, products = C * e, 4 * B * N, 2 * B * (N // 2) ** 2 * D
    keys_bytes = B * (N - 1) * row
    yield call("match", "", keys, R, floor=keys_bytes + per_token, flops=products)
    if N < 4096:  # emulating it takes seconds and says no more
        yield call("match", "two_way", keys, R, two_way=True, floor=keys_bytes + per_token, flops=2 * products)
    merged = B * (N + M) * row + 2 * per_token + 4 * B * M
    yield call("merge", "size", x, assign, M, size, floor=merged, flops=2 * B * N * C)
    yield call("unmerge", "", x[:, :M], assign, floor=B * (M + N) * row + per_token)
    yield call("match_merge", "size", x, keys, R, 1, size, floor=keys_bytes + merged, flops=products + 2 * B * N * C)
    yield call("topk", "", score, k, floor=2 * per_token)
    yield call("topk_gather", "", x, score, k, floor=2 * B * (k + 1) * row + 2 * per_token)
    fused = B * (N + k + 2) * row + 2 * per_token
    yield call("topk_gather", "mean", x, score, k, fuse="mean", floor=fused, flops=2 * B * (N - 1 - k) * C)
    tail = {"floor": 2 * B * (N + M) * row + 2 * row + 2 * per_token + 4 * B * M, "flops": B * (3 * N + 8 * M) * C}
    yield call("add_merge_norm", "size", x, branch, assign, M, *affine, size, **tail)
    if s is SHAPES[0]:
        yield call("add_merge_norm", "size, scale, bias", x, branch, assign, M, *affine, size, *affine, **tail)
    tail = {"floor": 2 * B * (N + k + 2) * row + 2 * row + 2 * per_token, "flops": B * (3 * N + 8 * k) * C}
    yield call("add_topk_gather_norm", "mean", x, branch, score, k, *affine, fuse="mean", **tail)
    if s is SHAPES[0]:
        form = "mean, scale, bias"
        yield call("add_topk_gather_norm", form, x, branch, score, k, *affine, 1, *affine, fuse="mean", **tail)


def _attention(s: Shape, call: Callable) -> Iterator[Call]:
    B, N, C, e = s.B, s.N, s.H * D, s.dtype.itemsize
    q, k, v = torch.zeros(B, N, 3, s.H, D, dtype=s.dtype).permute(2, 0, 3, 1, 4).unbind(0)
    size = torch.ones(B, N)
    once, per_token, product = B * N * C * e, 4 * B * N, 2 * B * s.H * N * N * D
    heads = B * s.H
    scored = {"floor": 4 * once + 2 * per_token, "flops": 2 * product, "parts": heads}
    cls = {"floor": once + B * C * e + 2 * per_token, "flops": 2 * B * C * N, "parts": heads}
    mean = {"floor": 2 * once + 2 * per_token, "flops": product, "parts": heads}
    if N < 4096:  # the others say as much there, and emulating each costs seconds
        yield call("attention", "", q, k, v, floor=4 * once, flops=2 * product, parts=heads)
        yield call("attention", "cls", q, k, v, size, scores="cls", **scored)
        yield call("attention_scores", "mean", q, k, size, scores="mean", **mean)
    yield call("attention", "mean", q, k, v, size, scores="mean", **scored)
    yield call("attention_scores", "cls", q, k, size, scores="cls", **cls)


def calls(shape: Shape) -> Iterator[Call]:
    """Of the ops that CUDA C++ and Triton both have."""

    def call(op: str, form: str, *args, floor: int, flops: int = 0, parts: int = shape.B, **kwargs) -> Call:
        return Call(op, form, shape, args, kwargs, floor, flops, parts)

    yield from _reduction(shape, call)
    yield from _attention(shape, call)


def triton_only(shape: Shape) -> Iterator[Call]:
    """Of the ops that have no CUDA C++ form."""
    B, N, C, e = shape.B, shape.N, shape.H * D, shape.dtype.itemsize

    def call(op: str, form: str, *args, floor: int, flops: int = 0, parts: int = B, **kwargs) -> Call:
        return Call(op, form, shape, args, kwargs, floor, flops, parts)

    q, k, v = torch.zeros(B, N, 3, shape.H, D, dtype=shape.dtype).permute(2, 0, 3, 1, 4).unbind(0)
    size, grad = torch.ones(B, N), torch.ones(B, N)
    once, product = B * N * C * e, 2 * B * shape.H * N * N * D
    for scores in ("none", "cls", "mean"):
        grad_scores = None if scores == "none" else grad
        yield call(
            "attention_backward", scores, q, grad_scores, q, k, v, q, size,
            scores=scores, floor=8 * once + 4 * B * N * (1 + (scores != "none")), flops=5 * product, parts=B * shape.H,
        )  # fmt: skip


def pairs(B: int, P: int, C: int) -> Iterator[Call]:
    """The clustering of P patches, float32."""
    shape = Shape(B, P, C // D, torch.float32)
    K = math.ceil(KEEP * P)
    matrix, per_token = 4 * B * P * P, 4 * B * P
    distance, weight = torch.zeros(B, P, P), torch.ones(B, P)
    centres = torch.arange(K, dtype=torch.int32).expand(B, K).contiguous()
    label = (torch.arange(P, dtype=torch.int32) % K).expand(B, P).contiguous()

    def call(op: str, form: str, *args, floor: int, flops: int = 0, **kwargs) -> Call:
        return Call(op, form, shape, args, kwargs, floor, flops, B)

    yield call(
        "pairwise_distance", "", torch.zeros(B, P, C), floor=per_token * C + matrix, flops=3 * B * P * P * C // 2
    )
    yield call("knn", "", distance, 5, floor=matrix + 10 * per_token)
    yield call("separation", "", distance, weight, floor=matrix + 2 * per_token)
    yield call("nearest", "", distance, centres, floor=matrix * K // P + per_token + 4 * B * K)
    yield call("medoids", "", distance, label, centres, weight, floor=matrix + 2 * per_token + 8 * B * K)
