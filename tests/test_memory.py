"""No op keeps memory. Until torch's own conversion of a str argument was gone, each call left 48 bytes behind, and the
heap grew by a whole attention output a call, in every second process: 300 KB at DeiT-S, one image."""

import ctypes
import functools

import pytest
import torch

from benchmarks import sanitize
from tokred_kernels._backend import OPS

FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _MallInfo(ctypes.Structure):
    _fields_ = [(field, ctypes.c_size_t) for field in FIELDS]


@functools.cache
def _mallinfo():
    try:
        found = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        pytest.skip("needs glibc's mallinfo2")
    found.restype = _MallInfo
    return found


def _bytes_a_call(call, measure, calls=500, tries=3) -> float:
    """The least growth of `measure` a call: whatever else allocates now and then is not in all tries."""
    found = []
    for _ in range(tries):
        before = measure()
        for _ in range(calls):
            call()
        found.append((measure() - before) / calls)
    return min(found)


@functools.cache
def _calls() -> dict:
    return {op: (args, kwargs) for op, _, args, kwargs in sanitize.steps()}


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_no_op_keeps_memory(op):
    info = _mallinfo()
    args, kwargs = _calls()[op]
    launch = getattr(torch.ops.tokred, op)
    assert _bytes_a_call(lambda: launch(*args, **kwargs), lambda: info().uordblks) < 16


def test_the_measure_sees_what_a_call_keeps():
    info, kept = _mallinfo(), []
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    assert _bytes_a_call(lambda: kept.append(malloc(40)), lambda: info().uordblks) >= 48


@torch.no_grad()
def test_the_heap_does_not_grow():
    info = _mallinfo()
    q, k, v = torch.randn(1, 197, 3, 6, 64).permute(2, 0, 3, 1, 4).unbind(0)

    def call():
        torch.ops.tokred.attention(q, k, v, scores="cls")

    call()
    assert _bytes_a_call(call, lambda: info().arena + info().hblkhd, calls=100) < 1000
