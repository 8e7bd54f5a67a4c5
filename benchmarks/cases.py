"""Shapes that are measured, their inputs, and every implementation of every op."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tokred
from tokred_kernels import reference
from tokred_kernels.cli.agreement import within_margin
from tokred_kernels.models import baselines


@dataclass(frozen=True)
class Shape:
    """One reduction step of a model: B images of N tokens, H heads of width 64, prefix 1."""

    model: str
    B: int
    N: int
    H: int
    r: int

    @property
    def C(self) -> int:
        return 64 * self.H

    def __str__(self) -> str:
        return f"{self.model}-B{self.B}-N{self.N}-r{self.r}"


HEADS = {"deit_tiny": 3, "deit_small": 6, "deit_base": 12}
SHAPES = [
    *(Shape(model, B, 197, heads, 13) for model, heads in HEADS.items() for B in (1, 8)),
    Shape("deit_small_384", 1, 577, 6, 38),
]


@dataclass(frozen=True)
class Inputs:
    """Arguments of the ops, as a block hands them over: the keys are a view of the qkv projection."""

    x: Tensor  # [B, N, C]
    q: Tensor  # [B, H, N, 64], strides of [B, N, 3, H, 64]
    keys: Tensor  # the same
    v: Tensor  # the same
    size: Tensor  # [B, N], integers from 1 to 4
    assign: Tensor  # [B, N] int32
    y: Tensor  # [B, N - r, C]
    score: Tensor  # [B, N], as the class token's attention: positive, its sum 1
    branch: Tensor  # [B, N, C], what attention adds to x
    r: int
    k: int  # patches that EViT keeps of the N - 1, 70 %

    @property
    def m(self) -> int:
        return self.y.shape[1]


def inputs(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Random tensors of a shape, never zeros: hardware saves power and time on those."""
    generator = torch.Generator().manual_seed(seed)
    B, N, H, C = shape.B, shape.N, shape.H, shape.C
    x = torch.randn(B, N, C, generator=generator)
    qkv = torch.randn(B, N, 3, H, 64, generator=generator)
    size = torch.randint(1, 5, (B, N), generator=generator).float()
    size[:, 0] = 1
    x, qkv, size = x.to(device, dtype), qkv.to(device, dtype), size.to(device)
    q, keys, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assign = reference.match(keys, shape.r)
    y, _ = reference.merge(x, assign, N - shape.r, size)
    score = torch.randn(B, N, generator=generator).softmax(1).to(device)
    branch = torch.randn(B, N, C, generator=generator).to(device, dtype)
    return Inputs(x, q, keys, v, size, assign, y, score, branch, shape.r, math.ceil(0.7 * (N - 1)))


def _eager_merge(i: Inputs) -> tuple[Tensor, Tensor]:
    """Any assignment, as scatter_add: plain PyTorch has no better general form."""
    wide = i.x.float() * i.size[..., None]
    row = i.assign.long()
    total = i.size.new_zeros(i.x.shape[0], i.m).scatter_add(1, row, i.size)
    out = wide.new_zeros(i.x.shape[0], i.m, i.x.shape[2]).scatter_add(1, row[..., None].expand_as(wide), wide)
    return (out / total[..., None]).to(i.x.dtype), total


def _sdpa(i: Inputs) -> tuple[Tensor, Tensor]:
    """SDPA with log size as a key mask, and the class token's row beside it."""
    bias = i.size.log().to(i.q.dtype)[:, None, None]
    out = F.scaled_dot_product_attention(i.q, i.keys, i.v, attn_mask=bias)
    row = (i.q[:, :, :1] * i.q.shape[-1] ** -0.5) @ i.keys.transpose(2, 3) + bias
    return out, row.float().softmax(-1)[:, :, 0].mean(1)


# op -> (a call of the op, the same in plain PyTorch)
OPS: dict[str, tuple[Callable, Callable]] = {
    "match": (
        lambda i: torch.ops.tokred.match(i.keys, i.r),
        lambda i: baselines.eager_match(i.keys, i.r),
    ),
    "merge": (lambda i: torch.ops.tokred.merge(i.x, i.assign, i.m, i.size), _eager_merge),
    "unmerge": (
        lambda i: torch.ops.tokred.unmerge(i.y, i.assign),
        lambda i: baselines.eager_unmerge(i.y, i.assign),
    ),
    "match_merge": (
        lambda i: torch.ops.tokred.match_merge(i.x, i.keys, i.r, 1, i.size),
        lambda i: baselines.eager_tome_step(i.x, i.keys, i.r, 1, i.size),
    ),
    "attention": (lambda i: torch.ops.tokred.attention(i.q, i.keys, i.v, i.size, scores="cls"), _sdpa),
    "topk": (
        lambda i: torch.ops.tokred.topk(i.score, i.k),
        lambda i: i.score[:, 1:].topk(i.k, dim=1).indices,
    ),
    "topk_gather": (
        lambda i: torch.ops.tokred.topk_gather(i.x, i.score, i.k, fuse="sum"),
        lambda i: baselines.eager_select(i.x, i.score, i.x.shape[1] - 1 - i.k, fuse="sum"),
    ),
}
IMPLEMENTATIONS = ("eager", "eager-compiled", "reference", "reference-compiled", "cpu", "triton", "cuda")


@contextlib.contextmanager
def implementation(name: str, op: str, device: str):
    """Within it, the yielded function of `Inputs` runs an op in one way; skips the benchmark where it cannot."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if name in ("cpu", "cuda") and name != device:
        pytest.skip(f"the {name} kernels do not take {device} tensors")
    if name == "triton" and device == "cpu":
        pytest.skip("Triton kernels run on a CPU only in the interpreter, whose speed means nothing")
    call, eager = OPS[op]
    if name.startswith("eager"):
        yield _compiled(eager) if name.endswith("compiled") else eager
        return
    if name == "reference-compiled":
        yield _compiled(_of_reference(op))
        return
    try:
        chosen = tokred.use_backend(name)
        chosen.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        yield call
    finally:
        chosen.__exit__(None, None, None)


def _of_reference(op: str) -> Callable:
    """An op of reference.py called as Python, which Inductor can look into."""
    return {
        "match": lambda i: reference.match(i.keys, i.r),
        "merge": lambda i: reference.merge(i.x, i.assign, i.m, i.size),
        "unmerge": lambda i: reference.unmerge(i.y, i.assign),
        "match_merge": lambda i: reference.match_merge(i.x, i.keys, i.r, 1, i.size),
        "attention": lambda i: reference.attention(i.q, i.keys, i.v, i.size, scores="cls"),
        "topk": lambda i: reference.topk(i.score, i.k),
        "topk_gather": lambda i: reference.topk_gather(i.x, i.score, i.k, fuse="sum"),
    }[op]


def _compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def check(op: str, i: Inputs, result) -> None:
    """Raises AssertionError unless the result of an implementation of `op` on `i` is right."""
    result = result if isinstance(result, tuple) else (result,)
    if op == "match" and len(result) == 3:  # the plain form names sources and destinations, not rows
        gone, kept, into = result
        result = (rows_of_plan(gone, kept, into, i.x.shape[1]),)
    if op == "match":
        assert within_margin(i.keys, result[0], i.r).all(), "match: not the r best edges"
        return
    if op == "unmerge":
        assert torch.equal(result[0], reference.unmerge(i.y, i.assign)), "unmerge: not the rows of y"
        return
    if op == "attention":
        exact = reference.attention(i.q.double(), i.keys.double(), i.v.double(), i.size, scores="cls")
        for got, want in zip(result, exact, strict=True):
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got.double(), want, rtol=8 * eps, atol=8 * eps * float(want.abs().amax()))
        return
    if op == "topk":
        want = reference.topk(i.score, i.k)
        if result[0].shape != want.shape:  # the plain form names the kept patches by falling score
            want = (want[:, 1:] >= 0).nonzero()[:, 1].view_as(result[0])
            result = (result[0].sort(dim=1).values,)
        assert torch.equal(result[0], want), "topk: not the k best patches"
        return
    if op == "topk_gather":
        want, assign = reference.topk_gather(i.x, i.score, i.k, fuse="sum")
        if len(result) == 1:  # the plain form orders patches by falling score
            by_score = i.score[:, 1:].argsort(dim=1, descending=True)[:, : i.k, None] + 1
            want = torch.cat([want[:, :1], i.x.gather(1, by_score.expand(-1, -1, i.x.shape[2])), want[:, -1:]], 1)
        assert torch.equal(result[0][:, :-1], want[:, :-1]), "topk_gather: not the rows of the k best patches"
        eps = torch.finfo(want.dtype).eps
        torch.testing.assert_close(result[0], want, rtol=8 * eps, atol=8 * eps * float(i.x.abs().amax()))
        assert len(result) == 1 or torch.equal(result[1], assign), "topk_gather: not its assignment"
        return
    # Random keys have no near-ties: every implementation of match_merge finds the same assignment.
    out, size_out = reference.merge(i.x, i.assign, i.m, i.size)
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(result[0], out, rtol=tolerance, atol=tolerance * float(out.abs().amax()))
    torch.testing.assert_close(result[1], size_out, rtol=0, atol=0)


def rows_of_plan(gone: Tensor, kept: Tensor, into: Tensor, N: int, prefix: int = 1) -> Tensor:
    """The assignment [B, N] int32 of a plan of `baselines.eager_match`."""
    B, Na = gone.shape[0], gone.shape[1] + kept.shape[1]
    first_b_row = prefix + kept.shape[1]
    assign = torch.arange(N, device=gone.device).repeat(B, 1)
    row_a = torch.empty(B, Na, dtype=torch.int64, device=gone.device)
    row_a.scatter_(1, gone, first_b_row + into)
    row_a.scatter_(1, kept, (prefix + torch.arange(kept.shape[1], device=gone.device)).expand_as(kept))
    first_b = prefix + 1 - prefix % 2
    assign[:, prefix + prefix % 2 :: 2] = row_a
    assign[:, first_b::2] = first_b_row + torch.arange(N - prefix - Na, device=gone.device)
    return assign.int()
