"""What every launcher does before its kernels: checks that only Triton needs, and arguments in a kernel's layout."""

import os

import torch
from torch import Tensor

from .. import _check

_DEBUG = os.environ.get("TOKRED_DEBUG") == "1"


def refuse_float64(op: str, argument: str, t: Tensor) -> None:
    if t.dtype == torch.float64:
        _check._fail(op, argument, "float32, float16 or bfloat16 on a CUDA device", "float64")


def refuse_stray_rows(op: str, rows: Tensor, end: int, argument: str = "assign", letter: str = "m") -> None:
    """Under TOKRED_DEBUG=1 a value that is neither a row nor -1 is an error (and the check a host sync)."""
    if not _DEBUG:
        return
    stray = rows[(rows < -1) | (rows >= end)]
    if stray.numel():
        expected = f"in [-1, {letter}) = [-1, {end}) under TOKRED_DEBUG=1"
        _check._fail(op, argument, expected, str(stray[0].item()))


def inner_contiguous(t: Tensor) -> Tensor:
    """t, or one contiguous copy where the innermost stride is not 1."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def per_token(t: Tensor | None) -> Tensor | None:
    """size, weight: contiguous float32; no copy in the steady state, where they are that already."""
    return None if t is None else t.float().contiguous()
