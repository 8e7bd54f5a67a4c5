"""G8 to G14: whole models against their oracles and baselines.

A part takes the device and returns figures, {goal: {case: value}}, and what else is worth keeping.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokred_kernels import schedule
from tokred_kernels.cli import agreement, variants

from .gpu_device import Calls, Gpu, best, by_sdpa
from .gpu_ops import Figures, Part
from .training_step import matrices

DEIT_T, DEIT_S, DEIT_B = (f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
VIT_L = "vit_large_patch16_224"
TOME, EVIT = ("tome", {"r": 13}), ("evit", {"keep_rate": 0.7})
OPTIONS = (TOME, ("tome", {"r": 8}), ("tome", {"r": 16}), EVIT, ("evit", {"keep_rate": 0.5}))
CHECKED = 8  # images whose every step is compared with the reference before anything is timed

# (model, method, options, images): what a row of the model table means for a goal.
G8 = {
    (DEIT_S, "r=13", 256): "G8 DeiT-S B=256",
    (DEIT_S, "r=13", 64): "G8 DeiT-S B=64",
    (DEIT_B, "r=13", 256): "G8 DeiT-B B=256",
    (VIT_L, "r=8", 64): "G8 ViT-L B=64",
}
G9 = {
    (DEIT_S, "r=13", 256): "G9 DeiT-S r=13",
    (DEIT_S, "r=16", 256): "G9 DeiT-S r=16",
    (VIT_L, "r=8", 64): "G9 ViT-L r=8",
    (DEIT_S, "keep_rate=0.7", 256): "G9 DeiT-S EViT .7",
}


def named(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def removes_too_much(model: str, options: dict) -> bool:
    """A constant r that leaves no patches before the last block: ViT-L has 24 blocks for 196."""
    return model == VIT_L and options.get("r", 0) * 24 >= 196


def row(model: str, method: str, options: dict, B: int) -> Callable[[Gpu], Part]:
    """A row of the model table; G8, G10 and G11 where it is one of theirs."""

    def measure(gpu: Gpu) -> Part:
        found, batch = _variants(gpu, model, method, options, B)
        calls: Calls = {}
        for name, variant in found.items():
            call = _forward(variant, batch)
            calls |= by_sdpa(name, call) if name in ("dense", "oracle", "plain_sdpa") else {name: call}
        times = gpu.time(calls)
        chosen = {name: best(times, name) for name in found}
        rows = variants.rows(chosen, method, B)
        macs = [schedule.macs(found[name]) for name in ("dense", method)]
        result = {"model": model, "method": method, "options": options, "batch_size": B}
        result |= {"ideal_speedup": macs[0] / macs[1], "variants": rows}
        t = {name: timing.median for name, timing in chosen.items()}
        figures: Figures = {}
        key, case = (model, named(options), B), f"B={B}"
        if key in G8:
            figures[G8[key]] = {case: rows[method]["re_sdpa"]}
        if model == DEIT_S and (method, options) == TOME and B >= 64:
            figures["G10 explicit"] = {case: t["plain_explicit"] / t[method]}
            figures["G10 sdpa"] = {case: t["plain_sdpa"] / t[method]}
        if model == DEIT_S and (method, options) == TOME and B in (1, 8):
            figures["G11"] = {case: t[method] / t["oracle"]}
        return figures, {"models": [result]}

    return measure


def compiled(model: str, method: str, options: dict, B: int, other: str = "dense") -> Callable[[Gpu], Part]:
    """G9, with "dense" as the other variant, or G10's compiled cases: the best of eager and compiled, both graphed."""

    def measure(gpu: Gpu) -> Part:
        found, batch = _variants(gpu, model, method, options, B)
        replays: Calls = {}
        for name in (other, method):
            forward = gpu.compile(found[name])
            cosine = agreement.cosine(forward(batch), found[name](batch))
            if cosine < variants.LEAST_COSINE[batch.dtype]:
                raise AssertionError(f"{name} compiled disagrees with {name}: cosine {cosine}")
            calls = by_sdpa(name, _forward(found[name], batch)) | {f"{name}, compiled": _forward(forward, batch)}
            replays |= {key: gpu.replay(call) for key, call in calls.items()}  # before another compilation
        times = gpu.time(replays, graph=False)
        ratio = best(times, other).median / best(times, method).median
        key = (model, named(options), B)
        seconds = {name: timing.median for name, timing in times.items()}
        raw = {f"compiled {model} {method} {named(options)} B={B} against {other}": seconds}
        if other != "dense":
            return {"G10 compiled": {other: ratio}}, raw
        return ({G9[key]: {f"B={B}": ratio}} if key in G9 else {}), raw

    return measure


def training(gpu: Gpu) -> Part:
    """G12: forward and backward, not in a graph."""
    B = gpu.batch(256)
    figures: Figures = {"G12": {}, "G12 memory": {}}
    seconds = {}
    for method, options in (TOME, EVIT):
        found, batch = _variants(gpu, DEIT_S, method, options, 256)
        target = torch.arange(B, device=gpu.name) % found["dense"].num_classes
        with torch.enable_grad():
            calls = {name: _step(found[name].train(), batch, target) for name in ("oracle", method, "plain_sdpa")}
            peaks = {name: gpu.peak(call) for name, call in calls.items()}
            t = {name: timing.median for name, timing in gpu.time(calls, graph=False).items()}
        figures["G12"][method] = t["oracle"] / t[method]
        figures["G12 memory"][method] = peaks[method] / peaks["oracle"]
        seconds[method] = {"seconds": t, "bytes": peaks}
    return figures, {"training": seconds}


def noise_free(gpu: Gpu) -> Part:
    """G13: what a reducing block adds, what waits, what the whole model is under torch.compile."""
    figures: Figures = {f"G13 {what}": {} for what in ("kernels", "host", "replay", "graphs", "matrices")}
    for method, options in (TOME, EVIT):
        found, batch = _variants(gpu, DEIT_S, method, options, 64)
        model = found[method]
        counts = schedule.tokens(model)
        ours, dense = (gpu.watch(_forward(found[name], batch)) for name in (method, "dense"))
        reducing = sum(before > after for before, after in counts)
        figures["G13 kernels"][method] = (ours.kernels - dense.kernels) / reducing
        figures["G13 host"][method] = float(ours.from_host)
        eager, replay = model(batch).clone(), gpu.replay(_forward(model, batch))
        figures["G13 replay"][method] = float(all(torch.equal(replay(), eager) for _ in range(3)))
        with _Shapes() as seen:
            model(batch)
        figures["G13 matrices"][method] = float(matrices(seen.found, {n for pair in counts for n in pair}))
        del replay
        torch._dynamo.utils.counters.clear()
        overhead = gpu.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):  # records, then replays
            cosine = agreement.cosine(overhead(batch), eager)
        if cosine < variants.LEAST_COSINE[batch.dtype]:
            raise AssertionError(f"{method} under reduce-overhead disagrees: cosine {cosine}")
        figures["G13 graphs"][method] = float(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return figures, {}


def mctf(gpu: Gpu) -> Part:
    """G14: scores of this very block against those at hand, at the same counts."""
    t = _side_by_side(gpu, "mctf", exact={"r": 16, "one_step_ahead": 1}, cheap={"r": 16, "one_step_ahead": 0})
    return {"G14": {"B=256": 100 * (t["exact"] / t["cheap"] - 1)}}, {"mctf": t}


def projected(gpu: Gpu) -> Part:
    """No goal: what ToMe gains where the qkv projection makes its metric."""
    return {}, {"tome": _side_by_side(gpu, "tome", keys={"r": 13}, projected={"r": 13, "metric": "projected"})}


class _Shapes(TorchDispatchMode):
    """The shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.found.add(tuple(t.shape))
        return result


def _variants(gpu: Gpu, name: str, method: str, options: dict, B: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The variants of a model and a batch; raises if their results disagree."""
    gpu.free()
    model, batch = gpu.create(name), _batch(gpu, B)
    found = variants.build(model, method, **options)
    checked = variants.verify(found, method, batch[:CHECKED], CHECKED)
    if not checked["passed"]:
        raise AssertionError(f"the results disagree: {checked}")
    return found, batch


def _side_by_side(gpu: Gpu, method: str, **forms: dict) -> dict[str, float]:
    """Seconds of a DeiT-S with options by name, B = 256."""
    calls = {}
    for name, options in forms.items():
        found, batch = _variants(gpu, DEIT_S, method, options, 256)
        calls[name] = _forward(found[method], batch)
    return {name: timing.median for name, timing in gpu.time(calls).items()}


def _batch(gpu: Gpu, B: int) -> Tensor:
    generator = torch.Generator(gpu.name).manual_seed(1)
    return torch.randn(gpu.batch(B), 3, *gpu.image, generator=generator, device=gpu.name).to(gpu.dtype)


def _forward(model: Callable, batch: Tensor) -> Callable[[], Tensor]:
    return lambda: model(batch)


def _step(model: nn.Module, batch: Tensor, target: Tensor) -> Callable[[], None]:
    def step() -> None:
        F.cross_entropy(model(batch).float(), target).backward()
        for p in model.parameters():
            p.grad = None

    return step
