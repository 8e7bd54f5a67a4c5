"""What an op takes within a model, where other layers had the caches before it: its data comes from memory, and its
code, torch's dispatcher and Python's too. For one image that may be three times what it takes repeated.

    python -m benchmarks.in_place --method evit --batch-size 8     every op of a block, a forward's worth
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import timm
import torch
from torch import Tensor, nn

import tokred_kernels as tokred
from tokred_kernels.cli.timing import keep_freed_memory

R = 13
METHODS = {"tome": {"r": R}, "evit": {"keep_rate": 0.7}}
OPS = ("match", "add_merge_norm", "attention", "add_topk_gather_norm")


@contextmanager
def _timed(op: str) -> Iterator[list[float]]:
    """The seconds of each call of torch.ops.tokred.<op> from here on."""
    launch, seconds = getattr(torch.ops.tokred, op), []

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = launch(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    with mock.patch.object(torch.ops.tokred, op, call):
        yield seconds


def measure(
    model: nn.Module, images: Tensor, ops: tuple[str, ...], rounds: int
) -> tuple[float, dict[str, list[float]]]:
    """Seconds of a forward on the CPU, and of each call of each op in it, in order; medians over the rounds."""
    model(images)
    forwards = []
    with ExitStack() as stack:
        found = {op: stack.enter_context(_timed(op)) for op in ops}
        for _ in range(rounds):
            start = time.perf_counter()
            model(images)
            forwards.append(time.perf_counter() - start)
    of_calls = {}
    for op, seconds in found.items():
        calls = len(seconds) // rounds
        of_calls[op] = [statistics.median(seconds[call::calls]) for call in range(calls)]
    return statistics.median(forwards), of_calls


def share(model: nn.Module, images: Tensor, op: str, rounds: int) -> float:
    """What all calls of an op take of a forward, in per cent."""
    forward, calls = measure(model, images, (op,), rounds)
    return 100 * sum(calls[op]) / forward


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_place", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--method", choices=METHODS, default="tome")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    model = tokred.apply(timm.create_model(args.model).eval(), args.method, **METHODS[args.method])
    images = torch.randn(args.batch_size, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        forward, of_calls = measure(model, images, OPS, args.rounds)
    print(f"{args.model}, {args.method}, B={args.batch_size}: {forward * 1e3:.1f} ms a forward")
    for op, calls in of_calls.items():
        if calls:
            each = " ".join(f"{call * 1e6:.0f}" for call in calls)
            print(f"{op:20} {sum(calls) * 1e6:6.0f} us = {100 * sum(calls) / forward:.2f} %, block by block {each}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
