"""The launches of the CUDA C++ launchers, compiled for the host, with the resources of the machine code."""

import functools
import inspect
import sys
from collections.abc import Iterator

import torch

from benchmarks.wheel import ROOT

from . import machine_code
from .calls import SHAPES, Call, calls
from .gpus import Gpu
from .rows import Launch

sys.path.insert(0, str(ROOT / "tests"))  # the emulator


def all_calls() -> Iterator[Call]:
    for shape in SHAPES:
        yield from calls(shape)


def is_counted(call: Call) -> bool:
    """float16 moves what bfloat16 does; attention of N = 4096 would take seconds."""
    return call.shape.dtype != torch.float16 and not (call.shape.N == 4096 and call.op.startswith("attention"))


@functools.cache
def _resources() -> dict[tuple[str, str], dict]:
    return machine_code.kernels()


def count(op: str, *args, **kwargs) -> int:
    """The number of launches."""
    from simt import counting

    return len(counting.launches(op, *args, share=0, **kwargs))


def launches(call: Call, gpu: Gpu, counted: bool) -> list[Launch]:
    """What the call launches on that GPU; bytes are counted by running a part of it."""
    from simt import counting, ops

    device = {}
    if "device" in inspect.signature(getattr(ops, call.op)).parameters:
        device["device"] = (gpu.multiprocessors, gpu.shared_block)
    share = 1 / call.parts if counted else 0
    found = []
    for launch in counting.launches(call.op, *call.args, share=share, **call.kwargs, **device):
        kernel = machine_code.readable(launch.kernel)
        facts = _resources()[kernel, gpu.arch.replace("sm", "sm_")]
        code = facts["code"]
        spills = facts["STACK"] + machine_code.count(code, "LDL") + machine_code.count(code, "STL")
        system = 0 if gpu.arch == "sm80" else 1024  # of a block, reported since sm_90; gpus.py adds it
        shared = launch.shared + max(0, facts["SHARED"] - system)
        moved = launch.read, launch.written, launch.from_l2
        found.append(Launch(kernel, launch.blocks, launch.threads, facts["REG"], spills, shared, *moved))
    return found
