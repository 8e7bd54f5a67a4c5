"""Measures the GPU goals and saves after each: `python -m benchmarks.gpu_measure FILE SECONDS`.

bfloat16, inference, CUDA graphs timed with events, variants interleaved, median. Ops rotate over four sets of inputs,
465 MB at B = 256, so that no cache serves them.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tokred_kernels as tokred
from tokred_kernels.cli import agreement, variants
from tokred_kernels.cli.timing import graphed, interleave

from . import cases, results

MODEL, R = "deit_small_patch16_224", 13
SETS = 4
Figures = dict[str, dict[str, float]]


def merge_bytes(B: int, N: int, M: int, C: int, element: int) -> int:
    """What a merge has to move: x, assign and size in, out and the new sizes out."""
    return B * (N * C * element + 4 * N + 4 * N + M * C * element + 4 * M)


def ops() -> tuple[Figures, dict]:
    """G4, G5 and the eager half of G7, and the microseconds behind them."""
    given = _inputs(256)
    i = given[0]
    candidates, seconds = {}, {}
    for backend in ("cuda", "triton"):
        for op in ("match", "merge", "match_merge"):
            try:
                with tokred.use_backend(backend):
                    cases.check(op, i, cases.OPS[op][0](i))
                    candidates[f"{op} {backend}"] = _rotating(cases.OPS[op][0], given)
            except Exception as error:  # one backend that is missing or wrong must not hide the other
                seconds[f"{op} {backend}"] = f"{type(error).__name__}: {error}"
    for op in ("match", "match_merge"):
        cases.check(op, i, cases.OPS[op][1](i))
        candidates[f"{op} eager"] = _rotating(cases.OPS[op][1], given)
    target = torch.empty_like(i.x)
    candidates["copy"] = _rotating(lambda j: target.copy_(j.x), given)
    times = {name: timing.median / SETS for name, timing in interleave(candidates, "cuda", rounds=30).items()}

    bandwidth = 2 * i.x.nbytes / times["copy"]
    moved = merge_bytes(*i.x.shape[:2], i.m, i.x.shape[2], i.x.element_size())
    figures = {"G4": {}, "G5": {}, "G7 eager": {}}
    for backend in _measured(times, "match_merge"):
        figures["G4"][backend] = times["match eager"] / times[f"match {backend}"]
        figures["G5"][backend] = 100 * moved / times[f"merge {backend}"] / bandwidth
        figures["G7 eager"][backend] = times["match_merge eager"] / times[f"match_merge {backend}"]
    seconds |= times
    return figures, {"ops": {**seconds, "copy bytes/s": bandwidth}}


def compiled_step() -> tuple[Figures, dict]:
    """The other half of G7."""
    given = _inputs(256)
    call, eager = cases.OPS["match_merge"]
    compiled = torch.compile(eager, dynamic=False)
    cases.check("match_merge", given[0], compiled(given[0]))
    candidates = {"ours": _rotating(call, given), "compiled": _rotating(compiled, given)}
    times = {name: timing.median / SETS for name, timing in interleave(candidates, "cuda", rounds=30).items()}
    return {"G7 compiled": {"B=256": times["compiled"] / times["ours"]}}, {"compiled step": times}


def models(B: int) -> tuple[Figures, dict]:
    """G8, G10 and G11 of one batch size, and the row of the model table."""
    found, batch = _variants(B)
    rows = variants.rows(variants.measure(found, batch, rounds=30), "tome", "cuda", B)
    median = {name: row["seconds_median"] for name, row in rows.items()}
    case = f"B={B}"
    figures: Figures = {}
    if B >= 64:
        figures[f"G8 DeiT-S {case}"] = {case: rows["tome"]["re_sdpa"]}
        figures["G10 explicit"] = {case: median["plain_explicit"] / median["tome"]}
        figures["G10 sdpa"] = {case: median["plain_sdpa"] / median["tome"]}
    else:
        figures["G11"] = {case: median["tome"] / median["oracle"]}
    macs = [tokred.schedule.macs(found[name]) for name in ("dense", "tome")]
    row = {"model": MODEL, "method": "tome", "options": {"r": R}, "batch_size": B}
    row |= {"ideal_speedup": macs[0] / macs[1], "variants": rows}
    return figures, {"models": [row]}


def noise_free() -> tuple[Figures, dict]:
    """G13: kernels a step adds, and a captured graph that replays to the same bits."""
    found, batch = _variants(64)
    reduced = found["tome"]
    torch.cuda.set_sync_debug_mode("error")  # a host sync inside the forward raises
    try:
        eager = reduced(batch).clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replay = graphed(lambda: reduced(batch))
    equal = all(torch.equal(replay(), eager) for _ in range(3))
    added = (_kernels(reduced, batch) - _kernels(found["dense"], batch)) / len(reduced.blocks)
    return {"G13 kernels": {"tome": added}, "G13 replay": {"tome": float(equal)}}, {}


def compiled_model(names: tuple[str, ...]) -> Callable[[], tuple[Figures, dict]]:
    """G9 (dense and ours) or G10's compiled cases (a plain form and ours), at B = 256."""

    def measure() -> tuple[Figures, dict]:
        found, batch = _variants(256)
        calls = {}
        for name in names:
            torch._dynamo.reset()
            compiled = torch.compile(found[name], dynamic=False)
            cosine = agreement.cosine(compiled(batch), found[name](batch))
            if cosine < variants.LEAST_COSINE[batch.dtype]:
                raise AssertionError(f"{name} compiled disagrees with {name}: cosine {cosine}")
            calls[name] = graphed(lambda name=name: found[name](batch))
            calls[f"{name} compiled"] = graphed(lambda compiled=compiled: compiled(batch))
        seconds = {name: timing.median for name, timing in interleave(calls, "cuda", rounds=30).items()}
        best = {name: min(seconds[name], seconds[f"{name} compiled"]) for name in names}
        other = best[names[0]] / best["tome"]
        goal, case = ("G9", "B=256") if names[0] == "dense" else ("G10 compiled", names[0])
        return {goal: {case: other}}, {" and ".join(names): seconds}

    return measure


def parts() -> Iterator[tuple[str, float, Callable[[], tuple[Figures, dict]]]]:
    """What is measured, with the seconds that must be left for it: the cheap and most wanted first."""
    yield "ops", 30, ops
    for B in (256, 64, 8, 1):
        yield f"models B={B}", 25, lambda B=B: models(B)
    yield "noise free", 20, noise_free
    yield "compiled step", 30, compiled_step
    yield "compiled dense", 120, compiled_model(("dense", "tome"))
    yield "compiled sdpa", 150, compiled_model(("plain_sdpa", "tome"))
    yield "compiled explicit", 150, compiled_model(("plain_explicit", "tome"))


def collect(path: Path, seconds: float, todo=None) -> dict:
    """Measures part after part, saving after each; what fails or does not fit is named under "not_measured"."""
    deadline = time.monotonic() + seconds
    result = {**results.provenance(), "figures": {}, "models": [], "raw": {}, "not_measured": {}}
    for name, needs, measure in parts() if todo is None else todo:
        if deadline - time.monotonic() < needs:
            result["not_measured"][name] = "no time left"
        else:
            try:
                figures, raw = measure()
                for goal, figure in figures.items():
                    result["figures"].setdefault(goal, {}).update(figure)
                result["models"] += raw.pop("models", [])
                result["raw"] |= raw
            except Exception as error:
                result["not_measured"][name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _inputs(B: int) -> list[cases.Inputs]:
    shape = cases.Shape("deit_small", B, 197, 6, R)
    return [cases.inputs(shape, "cuda", torch.bfloat16, seed) for seed in range(SETS)]


def _rotating(call: Callable, given: list[cases.Inputs]) -> Callable[[], object]:
    """One CUDA graph with a call on each set of inputs."""
    return graphed(lambda: [call(i) for i in given])


def _measured(times: dict[str, float], op: str) -> list[str]:
    return [b for b in ("cuda", "triton") if all(f"{o} {b}" in times for o in ("match", "merge", op))]


def _variants(B: int) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """The variants of DeiT-S on the GPU and a batch; raises if their results disagree."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval().to("cuda", torch.bfloat16)
    batch = torch.randn(B, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    found = variants.build(model, "tome", r=R)
    checked = variants.verify(found, "tome", batch, B)
    if not checked["passed"]:
        raise AssertionError(f"the results disagree: {checked}")
    return found, batch


def _kernels(model: nn.Module, batch: torch.Tensor) -> int:
    """GPU kernels and copies of one forward."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        model(batch)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def main() -> int:
    with torch.inference_mode():
        result = collect(Path(sys.argv[1]), float(sys.argv[2]) - 10)
    return 1 if result["not_measured"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
