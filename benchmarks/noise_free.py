"""What can be counted instead of timed: dispatched ops, allocated bytes, equal bits (C10)."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class _Counter(TorchDispatchMode):
    """Counts the ops that compute; a view moves nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.name() != "aten::_unsafe_view"  # a view that declares no alias
        return func(*args, **(kwargs or {}))


def ops(call: Callable[[], object]) -> int:
    """Dispatched ops of a call, views apart."""
    with _Counter() as counter:
        call()
    return counter.count


def ops_per_step(dense: nn.Module, reduced: nn.Module, images: Tensor, steps: int) -> int:
    """Ops that a reduction step adds to its block, rounded up."""
    return math.ceil((ops(lambda: reduced(images)) - ops(lambda: dense(images))) / steps)


def allocated_bytes(call: Callable[[], object]) -> int:
    """Bytes of tensor memory that a call on the CPU asks for; scratch that a thread frees itself is not counted."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        kept = call()
    events = profiled.profiler.kineto_results.events()
    del kept
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most tensor memory that a call on the CPU holds at a time, beyond what was there before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def saved_shapes(call: Callable[[], object]) -> set[tuple[int, ...]]:
    """The shapes of what autograd keeps for the backward of a call."""
    found = set()

    def keep(t: Tensor) -> Tensor:
        found.add(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return found


def nbytes(result) -> int:
    """Bytes of the tensors in the result of an op."""
    return sum(t.nbytes for t in (result if isinstance(result, tuple) else (result,)))


def bitwise_equal(call: Callable[[], object], threads=(1, 2), runs: int = 3) -> bool:
    """Whether a call gives the same bits in every run with every number of threads."""
    before = torch.get_num_threads()
    first = None
    try:
        for n in threads:
            torch.set_num_threads(n)
            for _ in range(runs):
                result = call()
                result = result if isinstance(result, tuple) else (result,)
                first = first or result
                if not all(torch.equal(a, b) for a, b in zip(first, result, strict=True)):
                    return False
    finally:
        torch.set_num_threads(before)
    return True
