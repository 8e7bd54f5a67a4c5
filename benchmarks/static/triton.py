"""The launches of the Triton launchers, with the resources of what is compiled for GPUs that are not here."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.wheel import ROOT

from .calls import SHAPES, Call, Shape, calls, pairs, triton_only
from .gpus import Gpu
from .rows import Launch

sys.path.insert(0, str(ROOT / "tests"))  # the ahead-of-time compiler


_PAIRS = ((64, 196, 384), (8, 576, 384))  # B, P, C
COUNTED = (Shape(64, 197, 6), Shape(64, 197, 6, torch.float32), Shape(8, 577, 6), Shape(64, 196, 6, torch.float32))


def all_calls() -> Iterator[Call]:
    for shape in SHAPES:
        yield from calls(shape)
        if shape.N < 1024:
            yield from triton_only(shape)
    for shape in _PAIRS:
        yield from pairs(*shape)


def is_counted(call: Call) -> bool:
    """The interpreter takes a second for what the emulator does in a hundredth."""
    return call.shape in COUNTED


class _Torch(TorchDispatchMode):
    """torch's own launches: everything but views and empty tensors."""

    def __init__(self):
        super().__init__()
        self.found: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            read = sum(t.nbytes for t in args if isinstance(t, torch.Tensor) and t is not result)
            self.found.append(Launch(f"torch {func.__name__.split('.')[0]}", 0, 0, 0, 0, 0, read, result.nbytes, read))
        return result


def count(op: str, *args, **kwargs) -> int:
    """The number of launches."""
    import triton_aot

    with _Torch() as torch_kernels:
        planned = triton_aot.plan(op, *args, **kwargs)
    return len(planned) + len(torch_kernels.found)


def launches(call: Call, gpu: Gpu, counted: bool) -> list[Launch]:
    """What the call launches on that GPU; bytes are counted by the interpreter, by running a part of it."""
    import triton_aot

    with _Torch() as torch_kernels:
        planned = triton_aot.plan(call.op, *call.args, **call.kwargs)
    moved = _moved()["/".join(call.id)] if counted else [(0, 0, 0)] * len(planned)
    found = list(torch_kernels.found)
    for (launch, programs), bytes_ in zip(planned, moved, strict=True):
        compiled = triton_aot.compile_for(launch, gpu.arch)
        got = triton_aot.resources(compiled, gpu.arch)
        threads = 32 * compiled.metadata.num_warps
        found.append(Launch(launch.name, programs, threads, got.registers, got.spills, got.shared, *bytes_))
    return found


@functools.cache
def _moved() -> dict[str, list[tuple[int, int, int]]]:
    """{call: (read, written, from L2) of each launch}, from a process that interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.static.interpreted"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.static.interpreted: {done.stderr[-2000:]}")
    return json.loads(done.stdout)
