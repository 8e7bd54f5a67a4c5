"""G1 to G7: single ops against what PyTorch has, and the seconds of every call of the static tables.

A part takes the device and returns figures, {goal: {case: value}}, and what else is worth keeping.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tokred
from tokred_kernels.models import baselines

from . import cases
from .gpu_device import Gpu, best, by_sdpa
from .static import cuda, triton
from .static.calls import Call

R = 13
LENGTHS = (197, 145, 93, 577)
Figures = dict[str, dict[str, float]]
Part = tuple[Figures, dict]


def attention(gpu: Gpu) -> Part:
    """G1, G2, G3, at 768 heads."""
    found: Figures = {"G1": {}, "G1 N=577": {}, "G2": {}, "G3 cls": {}, "G3 mean": {}}
    seconds = {}
    for N in LENGTHS:
        given = _inputs(gpu, 128, N)
        i = given[0]
        bias = [j.size.log().to(j.q.dtype)[:, None, None] for j in given]
        calls = {}
        for backend, use in _backends(gpu, "attention", i, seconds):
            for scores in ("none", "cls", "mean"):
                emitting = functools.partial(torch.ops.tokred.attention, scores=scores)
                calls[f"{backend} {scores}"] = use(
                    _rotating(lambda j, op=emitting: op(j.q, j.keys, j.v, j.size), given)
                )
        calls |= by_sdpa("plain", _rotating(lambda j: F.scaled_dot_product_attention(j.q, j.keys, j.v), given))
        calls |= by_sdpa("masked", lambda given=given, bias=bias: list(map(_masked, given, bias)))
        times = gpu.time(calls)
        t = {name: timing.median / gpu.sets for name, timing in times.items()}
        plain, masked = (best(times, name).median / gpu.sets for name in ("plain", "masked"))
        seconds |= {f"attention N={N} {name}": value for name, value in t.items()}
        ours = _first(gpu, t, "cls")
        case = f"{ours} N={N}"
        found["G1 N=577" if N == 577 else "G1"][case] = plain / t[f"{ours} cls"]
        found["G2"][case] = masked / t[f"{ours} cls"]
        if N <= 256:
            for scores in ("cls", "mean"):
                found[f"G3 {scores}"][case] = 100 * (t[f"{ours} {scores}"] / t[f"{ours} none"] - 1)
    return found, {"attention": seconds}


def steps(gpu: Gpu) -> Part:
    """G4, G5, and G7 against the eager step."""
    given = _inputs(gpu, 256, 197)
    i = given[0]
    calls, seconds = {}, {}
    for op in ("match", "merge", "match_merge"):
        for backend, use in _backends(gpu, op, i, seconds):
            calls[f"{backend} {op}"] = use(_rotating(cases.OPS[op][0], given))
    for backend, use in _backends(gpu, "match_merge", i, seconds):
        calls[f"{backend} whole"] = use(_rotating(_fused_step, given))
    for op in ("match", "match_merge"):
        cases.check(op, i, cases.OPS[op][1](i))
        calls[f"eager {op}"] = _rotating(cases.OPS[op][1], given)
    calls["eager whole"] = _rotating(_plain_step, given)
    target = torch.empty_like(i.x)
    calls["copy"] = _rotating(lambda j: target.copy_(j.x), given)
    t = {name: timing.median / gpu.sets for name, timing in gpu.time(calls).items()}

    ours, bandwidth = _first(gpu, t, "match_merge"), 2 * i.x.nbytes / t["copy"]
    moved = merge_bytes(*i.x.shape[:2], i.m, i.x.shape[2], i.x.element_size())
    figures = {
        "G4": {ours: t["eager match"] / t[f"{ours} match"]},
        "G5": {ours: 100 * moved / t[f"{ours} merge"] / bandwidth},
        "G7 eager": {
            f"{ours} match_merge": t["eager match_merge"] / t[f"{ours} match_merge"],
            f"{ours} with add and norm": t["eager whole"] / t[f"{ours} whole"],
        },
    }
    return figures, {"steps": {**seconds, **t}, "copy bytes/s": bandwidth}


def compiled_steps(gpu: Gpu) -> Part:
    """G6, and G7 against torch.compile."""
    given = _inputs(gpu, 256, 197)
    calls = {
        "fused": _rotating(_fused_tail, given),
        "match_merge": _rotating(cases.OPS["match_merge"][0], given),
        "whole": _rotating(_fused_step, given),
    }
    plain = {"add and norm": _add_norm, "plain match_merge": cases.OPS["match_merge"][1], "plain whole": _plain_step}
    replays = {name: gpu.replay(call) for name, call in calls.items()}
    for name, call in plain.items():
        compiled = gpu.compile(call)
        wanted, got = call(given[0]), compiled(given[0])
        torch.testing.assert_close(got[0], wanted[0], rtol=2e-2, atol=2e-2)
        replays[name] = gpu.replay(_rotating(compiled, given))  # before the next compilation forgets this one
    t = {name: timing.median / gpu.sets for name, timing in gpu.time(replays, graph=False).items()}
    return {
        "G6": {"B=256": t["fused"] / t["add and norm"]},
        "G7 compiled": {
            "match_merge": t["plain match_merge"] / t["match_merge"],
            "with add and norm": t["plain whole"] / t["whole"],
        },
    }, {"compiled steps": t}


def kernels(gpu: Gpu) -> Part:
    """Seconds of the calls whose bytes and FLOPs the static tables hold, for the roofline."""
    rows, failed = [], {}
    for backend, module in zip(gpu.backends, (cuda, triton), strict=True):
        for call in filter(module.is_counted, module.all_calls()):
            try:
                with tokred.use_backend(backend):
                    rows.append(_timed(gpu, backend, call))
            except Exception as error:  # one kernel that does not run must not hide the others
                failed[" ".join((backend, *call.id))] = f"{type(error).__name__}: {error}"
            gpu.free()
    source = torch.randn(gpu.cached // 4, device=gpu.name)
    target = torch.empty_like(source)
    copied = gpu.time({"copy": lambda: target.copy_(source)})["copy"].median
    return {}, {"kernels": rows, "bytes/s": 2 * source.nbytes / copied, "kernels that failed": failed}


def merge_bytes(B: int, N: int, M: int, C: int, element: int) -> int:
    """What a merge has to move: x, assign and size in, out and the new sizes out."""
    return B * (N * C * element + 4 * N + 4 * N + M * C * element + 4 * M)


def _timed(gpu: Gpu, backend: str, call: Call) -> dict:
    """A row of the roofline; warm: its inputs fit a cache, however many sets there are."""
    count = max(1, min(64, -(-gpu.cached // max(call.floor, 1))))
    sets = [([_filled(gpu, a, n) for a in call.args], _filled_all(gpu, call.kwargs, n)) for n in range(count)]
    op = getattr(torch.ops.tokred, call.op)
    timing = gpu.time({call.op: lambda: [op(*args, **kwargs) for args, kwargs in sets]})[call.op]
    row = dict(zip(("op", "form", "shape"), call.id, strict=True))
    return {"backend": backend, **row, "seconds": timing.median / count, "warm": count * call.floor < gpu.cached}


def _filled(gpu: Gpu, value, seed: int):
    """An argument of a static call on the device; what is all zeros there is random, with the same strides."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point() or value.any():
        return value.to(gpu.name)
    generator = torch.Generator(gpu.name).manual_seed(seed)
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=gpu.name)
    return empty.normal_(generator=generator)


def _filled_all(gpu: Gpu, kwargs: dict, seed: int) -> dict:
    return {name: _filled(gpu, value, seed) for name, value in kwargs.items()}


def _inputs(gpu: Gpu, B: int, N: int) -> list[cases.Inputs]:
    shape = cases.Shape("deit_small", gpu.batch(B), N, 6, R)
    return [cases.inputs(shape, gpu.name, gpu.dtype, seed) for seed in range(gpu.sets)]


def _rotating(call: Callable, given: list[cases.Inputs]) -> Callable[[], list]:
    return lambda: [call(i) for i in given]


def _backends(gpu: Gpu, op: str, i: cases.Inputs, failed: dict) -> Iterator[tuple[str, Callable]]:
    """Each backend whose result is right, with what makes a call run on it; why the others are out goes to `failed`."""
    for backend in gpu.backends:

        def use(call: Callable, backend=backend) -> Callable:
            def run():
                with tokred.use_backend(backend):
                    return call()

            return run

        try:
            cases.check(op, i, use(lambda: cases.OPS[op][0](i))())
        except Exception as error:
            failed[f"{backend} {op}"] = f"{type(error).__name__}: {error}"
            continue
        yield backend, use


def _first(gpu: Gpu, times: dict[str, float], name: str) -> str:
    """The backend that the figures are of: CUDA C++ where it runs."""
    return next(backend for backend in gpu.backends if f"{backend} {name}" in times)


def _masked(i: cases.Inputs, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(i.q, i.keys, i.v, attn_mask=bias)


def _add_norm(i: cases.Inputs) -> tuple[Tensor, Tensor]:
    """What follows attention in a block that does not reduce."""
    x = i.x + i.branch
    return x, F.layer_norm(x, x.shape[-1:])


def _fused_tail(i: cases.Inputs) -> tuple[Tensor, ...]:
    return torch.ops.tokred.add_merge_norm(i.x, i.branch, i.assign, i.m, None, None, i.size)


def _fused_step(i: cases.Inputs) -> tuple[Tensor, ...]:
    assign = torch.ops.tokred.match(i.keys, i.r)
    return torch.ops.tokred.add_merge_norm(i.x, i.branch, assign, i.m, None, None, i.size)


def _plain_step(i: cases.Inputs) -> tuple[Tensor, ...]:
    x, size = baselines.eager_tome_step(i.x + i.branch, i.keys, i.r, 1, i.size)
    return x, size, F.layer_norm(x, x.shape[-1:])
