"""The GPU that the goals are measured on: its clock, its memory, its kernels. Tests put a CPU in its place."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tokred_kernels.cli.timing import Timing, graphed, interleave

Calls = dict[str, Callable[[], object]]
# What torch may choose from for attention; which is fastest depends on N, so each is a baseline of its own.
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Watched:
    """One forward as the device saw it."""

    kernels: int  # and copies
    from_host: int  # copies from the host


class Gpu:
    """bfloat16 on the current CUDA device. A figure is the median of replays of a CUDA graph, variants interleaved."""

    name = "cuda"
    dtype = torch.bfloat16
    backends = ("cuda", "triton")
    sets = 4  # of inputs that an op rotates over: 465 MB at B = 256, so that no cache serves them
    image = (224, 224)
    cached = 256 << 20  # bytes: rotating over as many, no cache of a GPU serves any of them

    def batch(self, B: int) -> int:
        return B

    def create(self, model: str) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.name):
            return timm.create_model(model).eval().to(self.dtype)

    def compile(self, call: Callable, **options) -> Callable:
        torch._dynamo.reset()
        return torch.compile(call, dynamic=False, **options)

    def replay(self, call: Callable[[], object]) -> Callable[[], object]:
        return graphed(call)

    def time(self, calls: Calls, *, graph: bool = True, rounds: int = 20, max_seconds: float = 10) -> dict[str, Timing]:
        if graph:
            calls = {name: self.replay(call) for name, call in calls.items()}
        return interleave(calls, self.name, rounds=rounds, max_seconds=max_seconds)

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes: the most that a call holds at a time, beyond what was there before."""
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def watch(self, call: Callable[[], object]) -> Watched:
        """Raises RuntimeError if the call waits for the device."""
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            call()
            torch.cuda.synchronize()
        events = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return Watched(len(events), sum("HtoD" in name for name in events))

    def free(self) -> None:
        """Gives memory of graphs and models that are gone back to the device."""
        torch.cuda.empty_cache()


def by_sdpa(name: str, call: Callable[[], object]) -> Calls:
    """The call under torch's own choice of attention, and under each that runs here."""
    calls = {name: call}
    for kernel, backend in SDPA.items():

        def forced(backend=backend):
            with sdpa_kernel(backend):
                return call()

        try:
            forced()
        except RuntimeError:  # "No available kernel": not for this mask, dtype or device
            continue
        calls[f"{name}, {kernel}"] = forced
    return calls


def best(timings: dict[str, Timing], name: str) -> Timing:
    """The fastest of `by_sdpa`."""
    return min((t for key, t in timings.items() if key.split(",")[0] == name), key=lambda timing: timing.median)
