"""Argument checks of every op, shared by the reference, the fakes and the Triton launchers.

csrc/check.h does the same for C++ with the same words: `op: argument must be EXPECTED, got ACTUAL`. Everything raises
RuntimeError, the type that a C++ kernel raises through the dispatcher.
"""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCE = ("mean", "sum", "amax")


def clamp_r(r, N, prefix):
    """r limited to [0, P // 2], for ints and SymInts."""
    return torch.sym_max(0, torch.sym_min(r, (N - prefix) // 2))


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
    _dense(op, "assign", t)
    if t.dtype != torch.int32:
        _fail(op, "assign", f"int32 [B, N] = {[B, N]}", f"{_name(t.dtype)} {list(t.shape)}")
    _shape_and_device(op, "assign", t, "int32 [B, N]", (B, N), device)


def _prefix(op: str, prefix, N) -> None:
    if prefix < 0 or prefix > N:
        _fail(op, "prefix", f"in [0, N] = [0, {N}]", str(prefix))


def _metric(op: str, metric: Tensor) -> None:
    _floating(op, "metric", metric)
    if metric.dim() not in (3, 4):
        _fail(op, "metric", "[B, N, D] or [B, H, N, D]", str(list(metric.shape)))
    if metric.dim() == 4 and metric.shape[1] == 0:
        _fail(op, "metric", "[B, H, N, D] with H > 0", str(list(metric.shape)))


def match(metric: Tensor, r, prefix, weight: Tensor | None, power: float, two_way: bool) -> None:
    if two_way:
        raise NotImplementedError("match: two_way=True is not implemented yet")
    _metric("match", metric)
    _prefix("match", prefix, metric.shape[-2])
    _per_token("match", "weight", weight, metric.shape[0], metric.shape[-2], metric.device)


def merge(x: Tensor, assign: Tensor, m, size: Tensor | None, weight: Tensor | None, reduce: str) -> None:
    _floating("merge", "x", x)
    _rank("merge", "x", x, "[B, N, C]")
    B, N, _ = x.shape
    _assign("merge", assign, B, N, x.device)
    if m < 0:
        _fail("merge", "m", "at least 0", str(m))
    _per_token("merge", "size", size, B, N, x.device)
    _per_token("merge", "weight", weight, B, N, x.device)
    if reduce not in REDUCE:
        _fail("merge", "reduce", '"mean", "sum" or "amax"', f'"{reduce}"')


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
