"""C12: forward and backward of a reduced model against its oracle and its plain forms: time, memory, what is saved."""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred_kernels import schedule, use_backend
from tokred_kernels.cli import images, variants
from tokred_kernels.cli.timing import interleave

from . import noise_free

METHODS = {"tome": {"r": 13}, "evit": {"keep_rate": 0.7}, "mctf": {"r": 13}}
B = 8
MAX_SECONDS = 120.0  # a step takes seconds: about nine rounds of five variants


def _step(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    target = torch.arange(len(batch))

    def step() -> None:
        F.cross_entropy(model(batch), target).backward()
        for p in model.parameters():  # within the step: memory is that of every variant alike
            p.grad = None

    return step


def _by_reference(step: Callable[[], None]) -> Callable[[], None]:
    """A step by the ops' plain PyTorch form, for a method that has no plain model."""

    def plain() -> None:
        with use_backend("reference"):
            step()

    return plain


def figures(model: str, rounds: int) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """C12, its plain form, memory and saved tensors, and the seconds of every variant."""
    found: dict[str, dict[str, float]] = {"C12": {}, "C12 plain": {}, "C12 memory": {}, "C12 saved": {}}
    table = []
    for method, options in METHODS.items():
        torch.manual_seed(0)
        dense = timm.create_model(model)
        built = variants.build(dense.eval(), method, **options)
        _, photographs = images.load([], dense)
        batch = photographs[torch.arange(B) % len(photographs)]
        with torch.no_grad():
            checked = variants.verify(built, method, batch[:2], 2)
        if not checked["passed"]:
            raise SystemExit(f"the results disagree, nothing was timed: {checked}")
        steps = {name: _step(variant.train(), batch) for name, variant in built.items() if name != "oracle_self"}
        plain = "plain_explicit"
        if plain not in steps:
            plain = "reference"
            steps[plain] = _by_reference(steps[method])
        peaks = {name: noise_free.peak_bytes(steps[name]) for name in (method, "oracle")}
        counts = {n for pair in schedule.tokens(built[method]) for n in pair}
        shapes = noise_free.saved_shapes(lambda built=built, m=method, x=batch: built[m](x))
        timings = interleave(steps, rounds=rounds, max_seconds=MAX_SECONDS)
        seconds = {name: timing.median for name, timing in timings.items()}
        found["C12"][method] = timings["oracle"].over(timings[method])
        found["C12 plain"][method] = timings[plain].over(timings[method])
        found["C12 memory"][method] = peaks[method] / peaks["oracle"]
        found["C12 saved"][method] = float(matrices(shapes, counts))
        table.append({"model": model, "method": method, "options": options, "batch_size": B, "seconds": seconds})
    return found, table


def matrices(shapes: set[tuple[int, ...]], counts: set[int]) -> int:
    """How many shapes end in two numbers of tokens."""
    return sum(len(shape) > 1 and {*shape[-2:]} <= counts for shape in shapes)
