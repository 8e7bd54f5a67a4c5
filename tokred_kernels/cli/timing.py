"""Interleaved timing: every candidate once per round, after as many calls that are not timed, so that a slow moment of
the machine hits all of them alike.

Quote ratios: `Timing.over`, the median of the ratios within each round. Of DeiT-S, one image a call, in 20 rounds on a
shared virtual machine it spread by 0.9 %, the ratio of the 10th percentiles by 3.5 %, of the fastest by 2 to 6 %.
"""

import contextlib
import ctypes
import math
import operator
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A sample shorter than this is repeated within itself: below it, timers and event records weigh too much.
_SHORTEST_SAMPLE_S = 1e-3


@dataclass
class Timing:
    """Seconds a call, one entry a round."""

    seconds: list[float]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Timing") -> float:
        """How many times as long as other it takes: median over the rounds of the two, which ran side by side."""
        return statistics.median(map(operator.truediv, self.seconds, other.seconds))


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for the rest of the process; elsewhere does nothing.

    Without it a forward takes thousands of page faults, how many depends on the order in which tensors are freed, and
    two variants of a model differ by up to 8 % for that reason alone.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def interleave(
    candidates: dict[str, Callable[[], object]],
    device: str = "cpu",
    *,
    rounds: int = 15,
    max_seconds: float = math.inf,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times every candidate once per round, each time after a sample of its own that is not timed.

    Args:
        candidates: what to time, by name; each call must do the same work.
        device: "cuda" times with events on the current stream, anything else with the wall clock.
        rounds: how many samples of each.
        max_seconds: no further round starts after this long, but three are always run.
        on_round: called after every round.
    """
    sample = _sample_cuda if device.startswith("cuda") else _sample_cpu
    keep_freed_memory()
    repeats = {}
    for name, call in candidates.items():
        call()  # the first call allocates, plans and compiles
        once = min(sample(call, 1) for _ in range(2))
        repeats[name] = max(1, math.ceil(_SHORTEST_SAMPLE_S / max(once, 1e-9)))

    names, order = list(candidates), random.Random(0)
    seconds = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > max_seconds:
            break
        # In another order each time: a forward after one of the same shapes, in its caches, is 1 to 2 % faster. The
        # first forward after another model's is up to 2 % slower than the next ones, which are what repeated use is; of
        # an op that moves some megabytes the first three calls are, by up to 3 times, until the cache keeps its data.
        for name in order.sample(names, len(names)):
            sample(candidates[name], repeats[name])
            seconds[name].append(sample(candidates[name], repeats[name]))
        on_round()
    return {name: Timing(values) for name, values in seconds.items()}


def _sample_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _sample_cuda(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def graphed(call: Callable[[], object], warmup: int = 3) -> Callable[[], object]:
    """A CUDA graph of the call, replayed by calling the result; its inputs and outputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants plans, workspaces and autotuning done beforehand
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay():
        graph.replay()
        return kept  # the output lives in the graph's own memory pool

    return replay
