"""Argument checks of every op, shared by the reference, the fakes and the Triton launchers.

csrc/check.h does the same for C++ with the same words: `op: argument must be EXPECTED, got ACTUAL`. Everything raises
RuntimeError, the type that a C++ kernel raises through the dispatcher.
"""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCE = ("mean", "sum", "amax")
SCORES = ("none", "cls", "mean")
FUSE = ("none", "sum", "mean")
UPDATE = ("textbook", "wttu")
MAX_WIDTH = 128


def clamp_r(r, N, prefix):
    """r limited to [0, P // 2], for ints and SymInts."""
    return torch.sym_max(0, torch.sym_min(r, (N - prefix) // 2))


def scale(scale: float | None, D: int) -> float:
    """The factor on the logits: D^-1/2 unless given."""
    return scale if scale is not None else D**-0.5 if D else 1.0


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which scores, norms and sums are formed."""
    return x if x.dtype == torch.float64 else x.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fail(op: str, argument: str, expected: str, got: str) -> None:
    raise RuntimeError(f"{op}: {argument} must be {expected}, got {got}")


def _dense(op: str, argument: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_quantized:
        _fail(op, argument, "a dense tensor", "a quantized tensor" if t.is_quantized else f"layout {t.layout}")


def _floating(op: str, argument: str, t: Tensor) -> None:
    _dense(op, argument, t)
    if t.dtype not in FLOATING:
        _fail(op, argument, "float32, float16, bfloat16 or float64", _name(t.dtype))


def _rank(op: str, argument: str, t: Tensor, letters: str) -> None:
    if t.dim() != letters.count(",") + 1:
        _fail(op, argument, letters, str(list(t.shape)))


def _per_token(op: str, argument: str, t: Tensor | None, B, N, device: torch.device) -> None:
    """size, weight: [B, N] of any floating dtype."""
    if t is None:
        return
    _floating(op, argument, t)
    _shape_and_device(op, argument, t, "[B, N]", (B, N), device)


def _shape_and_device(op: str, argument: str, t: Tensor, letters: str, shape: tuple, device: torch.device) -> None:
    if t.dim() != len(shape) or any(have != want for have, want in zip(t.shape, shape, strict=True)):
        _fail(op, argument, f"{letters} = {list(shape)}", str(list(t.shape)))
    if t.device != device:
        _fail(op, argument, f"on {device}", str(t.device))


def _assign(op: str, t: Tensor, B, N, device: torch.device) -> None:
    _rows(op, "assign", t, "[B, N]", (B, N), device)


def _rows(op: str, argument: str, t: Tensor, letters: str, shape: tuple, device: torch.device) -> None:
    """assign, label, centres: int32."""
    _dense(op, argument, t)
    if t.dtype != torch.int32:
        _fail(op, argument, f"int32 {letters} = {list(shape)}", f"{_name(t.dtype)} {list(t.shape)}")
    _shape_and_device(op, argument, t, f"int32 {letters}", shape, device)


def _prefix(op: str, prefix, N) -> None:
    if prefix < 0 or prefix > N:
        _fail(op, "prefix", f"in [0, N] = [0, {N}]", str(prefix))


def _metric(op: str, metric: Tensor) -> None:
    _floating(op, "metric", metric)
    if metric.dim() not in (3, 4):
        _fail(op, "metric", "[B, N, D] or [B, H, N, D]", str(list(metric.shape)))
    if metric.dim() == 4 and metric.shape[1] == 0:
        _fail(op, "metric", "[B, H, N, D] with H > 0", str(list(metric.shape)))


def match(metric: Tensor, r, prefix, weight: Tensor | None) -> None:
    _metric("match", metric)
    _prefix("match", prefix, metric.shape[-2])
    _per_token("match", "weight", weight, metric.shape[0], metric.shape[-2], metric.device)


def merge(x: Tensor, assign: Tensor, m, size: Tensor | None, weight: Tensor | None, reduce: str, op="merge") -> None:
    _floating(op, "x", x)
    _rank(op, "x", x, "[B, N, C]")
    B, N, _ = x.shape
    _assign(op, assign, B, N, x.device)
    if m < 0:
        _fail(op, "m", "at least 0", str(m))
    _per_token(op, "size", size, B, N, x.device)
    _per_token(op, "weight", weight, B, N, x.device)
    _one_of(op, "reduce", reduce, REDUCE)


def add_merge_norm(
    x: Tensor,
    branch: Tensor,
    assign: Tensor,
    m,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    size: Tensor | None,
    branch_scale: Tensor | None,
    branch_bias: Tensor | None,
) -> None:
    merge(x, assign, m, size, None, "mean", "add_merge_norm")
    _add_norm("add_merge_norm", x, branch, norm_weight, norm_bias, branch_scale, branch_bias)


def _add_norm(op: str, x: Tensor, branch: Tensor, *rows: Tensor | None) -> None:
    _dense(op, "branch", branch)
    if branch.dtype != x.dtype:
        _fail(op, "branch", f"{_name(x.dtype)} as x", _name(branch.dtype))
    _shape_and_device(op, "branch", branch, "[B, N, C]", x.shape, x.device)
    for argument, t in zip(("norm_weight", "norm_bias", "branch_scale", "branch_bias"), rows, strict=True):
        if t is not None:
            _floating(op, argument, t)
            _shape_and_device(op, argument, t, "[C]", x.shape[2:], x.device)


def unmerge(y: Tensor, assign: Tensor) -> None:
    _floating("unmerge", "y", y)
    _rank("unmerge", "y", y, "[B, M, C]")
    _dense("unmerge", "assign", assign)
    if assign.dim() != 2:
        _fail("unmerge", "assign", "int32 [B, N]", str(list(assign.shape)))
    _assign("unmerge", assign, y.shape[0], assign.shape[1], y.device)


def match_merge(x: Tensor, metric: Tensor, r, prefix, size: Tensor | None) -> None:
    _floating("match_merge", "x", x)
    _rank("match_merge", "x", x, "[B, N, C]")
    _metric("match_merge", metric)
    B, N, _ = x.shape
    D = metric.shape[-1]
    if metric.dim() == 3:
        _shape_and_device("match_merge", "metric", metric, "[B, N, D]", (B, N, D), x.device)
    else:
        _shape_and_device("match_merge", "metric", metric, "[B, H, N, D]", (B, metric.shape[1], N, D), x.device)
    _prefix("match_merge", prefix, N)
    _per_token("match_merge", "size", size, B, N, x.device)


def _keys(op: str, argument: str, t: Tensor, q: Tensor, B, H, N, D) -> None:
    """k and v: [B, H, N, D] in the dtype and on the device of q."""
    _dense(op, argument, t)
    if t.dtype != q.dtype:
        _fail(op, argument, f"{_name(q.dtype)} as q", _name(t.dtype))
    _shape_and_device(op, argument, t, "[B, H, N, D]", (B, H, N, D), q.device)


def _one_of(op: str, argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = [f'"{name}"' for name in allowed]
        _fail(op, argument, f"{', '.join(names[:-1])} or {names[-1]}", f'"{value}"')


def attention(op: str, q: Tensor, k: Tensor, v: Tensor | None, size: Tensor | None, scores: str) -> None:
    _floating(op, "q", q)
    _rank(op, "q", q, "[B, H, Nq, D]")
    B, H, _, D = q.shape
    if H == 0 or D % 8 != 0 or D > MAX_WIDTH:
        _fail(op, "q", f"[B, H, Nq, D] with H > 0 and D a multiple of 8 up to {MAX_WIDTH}", str(list(q.shape)))
    _dense(op, "k", k)
    _rank(op, "k", k, "[B, H, N, D]")
    N = k.shape[2]
    _keys(op, "k", k, q, B, H, N, D)
    if v is not None:
        _keys(op, "v", v, q, B, H, N, D)
    _per_token(op, "size", size, B, N, q.device)
    _one_of(op, "scores", scores, SCORES if op != "attention_scores" else SCORES[1:])


def attention_backward(
    grad_out: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    size: Tensor | None,
    scores: str,
) -> None:
    op = "attention_backward"
    attention(op, q, k, v, size, scores)
    for argument, t in (("grad_out", grad_out), ("out", out)):
        if t is not None:
            _keys(op, argument, t, q, *q.shape)
    if grad_scores is not None:
        _floating(op, "grad_scores", grad_scores)
        N = k.shape[2]
        shape = (q.shape[0], 0 if scores == "none" else N)
        _shape_and_device(op, "grad_scores", grad_scores, "[B, N]", shape, q.device)


def topk(op: str, score: Tensor, k, prefix) -> None:
    _floating(op, "score", score)
    _rank(op, "score", score, "[B, N]")
    _prefix(op, prefix, score.shape[1])
    if k < 0:
        _fail(op, "k", "at least 0", str(k))


def topk_gather(x: Tensor, score: Tensor, k, prefix, fuse: str, op: str = "topk_gather") -> None:
    _floating(op, "x", x)
    _rank(op, "x", x, "[B, N, C]")
    _floating(op, "score", score)
    _shape_and_device(op, "score", score, "[B, N]", tuple(x.shape[:2]), x.device)
    topk(op, score, k, prefix)
    _one_of(op, "fuse", fuse, FUSE)


def add_topk_gather_norm(
    x: Tensor,
    branch: Tensor,
    score: Tensor,
    k,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    prefix,
    branch_scale: Tensor | None,
    branch_bias: Tensor | None,
    fuse: str,
) -> None:
    topk_gather(x, score, k, prefix, fuse, "add_topk_gather_norm")
    _add_norm("add_topk_gather_norm", x, branch, norm_weight, norm_bias, branch_scale, branch_bias)


def pairwise_distance(x: Tensor) -> None:
    _floating("pairwise_distance", "x", x)
    _rank("pairwise_distance", "x", x, "[B, N, C]")


def _distance(op: str, distance: Tensor) -> None:
    _floating(op, "distance", distance)
    if distance.dim() != 3 or distance.shape[1] != distance.shape[2]:
        _fail(op, "distance", "[B, N, N]", str(list(distance.shape)))


def _centres(op: str, centres: Tensor, distance: Tensor) -> None:
    if centres.dim() != 2:
        _fail(op, "centres", "int32 [B, K]", str(list(centres.shape)))
    _rows(op, "centres", centres, "[B, K]", (distance.shape[0], centres.shape[1]), distance.device)


def knn(distance: Tensor, k) -> None:
    _distance("knn", distance)
    if k < 0:
        _fail("knn", "k", "at least 0", str(k))


def separation(distance: Tensor, density: Tensor) -> None:
    _distance("separation", distance)
    _per_token("separation", "density", density, *distance.shape[:2], distance.device)


def nearest(distance: Tensor, centres: Tensor) -> None:
    _distance("nearest", distance)
    _centres("nearest", centres, distance)


def medoids(distance: Tensor, label: Tensor, centres: Tensor, weight: Tensor, update: str) -> None:
    _distance("medoids", distance)
    B, N, _ = distance.shape
    _rows("medoids", "label", label, "[B, N]", (B, N), distance.device)
    _centres("medoids", centres, distance)
    _per_token("medoids", "weight", weight, B, N, distance.device)
    _one_of("medoids", "update", update, UPDATE)
