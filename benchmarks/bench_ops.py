"""Every op in every implementation and shape, verified, then timed: `pytest benchmarks/bench_ops.py -k match_merge`."""

import pytest
import torch

from tokred_kernels.cli.timing import graphed

from . import cases

# Inductor takes some ten seconds a case: compiled forms where performance goals name them.
COMPILED_SHAPES = ("deit_small-B1-N197-r13", "deit_small-B8-N197-r13")
CASES = [
    pytest.param(op, shape, name, id=f"{op}-{shape}-{name}")
    for op in cases.OPS
    for shape in cases.SHAPES
    for name in cases.IMPLEMENTATIONS
    if not name.endswith("compiled") or (op == "match_merge" and str(shape) in COMPILED_SHAPES)
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("op", "shape", "name"), CASES)
def bench_op(benchmark, op, shape, name, device):
    with cases.implementation(name, op, device) as call:
        given = cases.inputs(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
        cases.check(op, given, call(given))
        benchmark.group = f"{op} {shape} {device}"
        if device == "cuda":
            replay = graphed(lambda: call(given))
            benchmark(lambda: (replay(), torch.cuda.synchronize()))
        else:
            benchmark(call, given)
