"""Measures the CPU goals and prints them with their gates; prints the GPU goals from saved results.

    python -m benchmarks.report                      measure, print, save benchmarks/results/<machine>.json
    python -m benchmarks.report --show               print what was saved

One thread, variants interleaved in one process, medians of the ratios within 15 rounds; nothing is timed before its
result was compared with the reference.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from tokred_kernels import schedule, use_backend
from tokred_kernels._backend import ATTENTION
from tokred_kernels.cli import compare, images, machine, table, variants
from tokred_kernels.cli.timing import Timing, interleave, keep_freed_memory

from . import cases, clusters, cpu_attention, goals, in_place, noise_free, results, training_step
from .in_place import METHODS, R

DEIT_S = "deit_small_patch16_224"
BATCHES = (1, 8)
# Beside the model of the goals: DeiT-T and B, and 577 tokens with the r and keep rate that suit them.
OTHERS = (
    ("deit_tiny_patch16_224", "tome", {"r": R}),
    ("deit_tiny_patch16_224", "evit", {"keep_rate": 0.7}),
    ("deit_base_patch16_224", "tome", {"r": R}),
    ("deit_base_patch16_224", "evit", {"keep_rate": 0.7}),
    ("vit_small_patch16_384", "tome", {"r": 38}),
    ("vit_small_patch16_384", "evit", {"keep_rate": 0.7}),
)


def step_figures(rounds: int) -> dict[str, dict[str, float]]:
    """C1, C2, C3, C6: one reduction step."""
    torch.manual_seed(0)
    block = timm.create_model(DEIT_S).eval().blocks[0]
    compiled = torch.compile(cases.OPS["match_merge"][1], dynamic=False)
    figures = {"C1": {}, "C2": {}, "C3": {}, "C6": {}}
    for B in BATCHES:
        given = cases.inputs(cases.Shape("deit_small", B, 197, 6, R))
        calls = {
            "ours": lambda given=given: cases.OPS["match_merge"][0](given),
            "eager": lambda given=given: cases.OPS["match_merge"][1](given),
            "compiled": lambda given=given: compiled(given),
            "block": lambda given=given: block(given.x),
            "topk_gather": lambda given=given: cases.OPS["topk_gather"][0](given),
            "eager_select": lambda given=given: cases.OPS["topk_gather"][1](given),
        }
        for name in ("ours", "eager", "compiled"):
            cases.check("match_merge", given, calls[name]())
        for name in ("topk_gather", "eager_select"):
            cases.check("topk_gather", given, calls[name]())
        t = interleave(calls, rounds=rounds)
        figures["C1"][f"B={B}"] = t["eager"].over(t["ours"])
        figures["C2"][f"B={B}"] = t["compiled"].over(t["ours"])
        figures["C3"][f"B={B}"] = t["eager_select"].over(t["topk_gather"])
        figures["C6"][f"B={B}"] = 100 * t["ours"].over(t["block"])
    return figures


def attention_figures(rounds: int) -> dict[str, dict[str, float]]:
    """C4, C5: attention in each instruction set of this machine."""
    figures = {"C5": {}}
    vendor = " on Intel" if "intel" in machine.cpu()["name"].lower() else ""
    best = machine.cpu()["isa"]
    for isa in ("amx", "avx512", "avx2"):
        found = cpu_attention.measure_apart(isa, rounds)
        if found is None:
            continue
        width = "AVX2" if isa == "avx2" else f"AVX-512{vendor}"
        for case, value in found["masked"].items():
            figures.setdefault(f"C4 {width}", {})[f"{isa} {case}"] = value
        if isa == best:
            figures["C5"] |= {f"{scores} {case}": x for scores in ("cls", "mean") for case, x in found[scores].items()}
    found = cpu_attention.measure_apart(best, rounds, "bfloat16")
    figures["C4 bfloat16"] = {case: min(found["plain"][case], found["masked"][case]) for case in found["plain"]}
    return figures


class _WithSdpa(nn.Module):
    """A patched model whose attention is torch's, with log size as a mask."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        ours = ATTENTION["cpu"]
        ATTENTION["cpu"] = dict.fromkeys(ours, "sdpa")
        try:
            return self.model(x)
        finally:
            ATTENTION["cpu"] = ours


class _OnReference(nn.Module):
    """A patched model on reference.py; changing the backend takes .2 ms."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with use_backend("reference"):
            return self.model(x)


def _measured(
    name: str, method: str, options: dict, B: int, rounds: int, max_seconds: float
) -> tuple[dict, dict[str, nn.Module], Tensor, dict[str, Timing]]:
    """The rows of a model, its variants, verified, its photographs, and the times of the variants."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    found = variants.build(model, method, **options)
    _, photographs = images.load([], model)
    batch = photographs[torch.arange(B) % len(photographs)]
    checked = variants.verify(found, method, batch, B)
    if not checked["passed"]:
        raise SystemExit(f"the results disagree, nothing was timed: {checked}")
    if method == "tome":
        found["tome_sdpa"] = _WithSdpa(found["tome"])
    if name == DEIT_S:
        found["reference"] = _OnReference(found[method])
    timings = variants.measure(found, batch, rounds=rounds, max_seconds=max_seconds)
    case = {
        "model": name,
        "method": method,
        "options": options,
        "batch_size": B,
        "ideal_speedup": schedule.macs(model) / schedule.macs(found[method]),
        "variants": variants.rows(timings, method, B),
    }
    return case, found, photographs, timings


def model_figures(rounds: int) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """C6 in place, C7, C8, C9 and C10's ops, and the rows of the model table."""
    figures = {"C6 in place": {}, "C7": {}, "C7 sdpa": {}, "C8": {}, "C9": {}, "C9 plain": {}, "C10 ops": {}}
    cases_found = []
    for method, options in METHODS.items():
        for B in BATCHES:
            case, found, photographs, timings = _measured(DEIT_S, method, options, B, rounds, float("inf"))
            rows, key = case["variants"], f"{method} B={B}"
            cases_found.append(case)
            figures["C7"][key] = rows[method]["re_sdpa"]
            figures["C8"][key] = rows[method]["re_self"]
            figures["C9"][key] = timings["reference"].over(timings[method])
            figures["C9 plain"][key] = timings["plain_explicit"].over(timings[method])
            if method == "tome":
                figures["C7 sdpa"][key] = timings["oracle"].over(timings["tome_sdpa"])
                batch = photographs[torch.arange(B) % len(photographs)]
                figures["C6 in place"][f"B={B}"] = in_place.share(found["tome"], batch, "match", rounds)
        counts = schedule.tokens(found[method])
        steps = sum(before > after for before, after in counts)
        figures["C10 ops"][method] = noise_free.ops_per_step(found["dense"], found[method], photographs, steps)
    for name, method, options in OTHERS:
        for B in (1,) if "base" in name or "384" in name else BATCHES:
            cases_found.append(_measured(name, method, options, B, rounds, 20)[0])
    return figures, cases_found


def method_rows(rounds: int) -> list[dict]:
    """Every method of the registry at keep rate .7, B = 8, against its oracle."""
    torch.manual_seed(0)
    model = timm.create_model(DEIT_S).eval()
    _, photographs = images.load([], model)
    batch = photographs[torch.arange(8) % len(photographs)]
    with table.progress() as progress:
        limits = {"rounds": rounds, "max_seconds": 120}
        found = compare.measure(model, photographs, batch, [0.7], None, progress, **limits)
    if not found["agreement"]["passed"]:
        raise SystemExit(f"the results disagree: {[row for row in found['rows'] if not row['agreement']['passed']]}")
    kept = ("method", "keep_rate", "untrained", "macs", "images_per_second", "speedup", "re_sdpa", "seconds_median")
    return [{key: row[key] for key in kept} for row in found["rows"]]


def noise_free_figures() -> dict[str, dict[str, float]]:
    """C10's bytes and bits, of each op."""
    figures = {"C10 bytes": {}, "C10 bitwise": {}}
    given = cases.inputs(cases.Shape("deit_small", 8, 197, 6, R))
    for op in ("match", "merge", "match_merge", "topk", "topk_gather"):
        call = cases.OPS[op][0]
        allowed = noise_free.nbytes(call(given)) + 64 * given.x.shape[0] * given.x.shape[1]
        figures["C10 bytes"][op] = noise_free.allocated_bytes(lambda call=call: call(given)) / allowed
        figures["C10 bitwise"][op] = float(noise_free.bitwise_equal(lambda call=call: call(given)))
    return figures


def measure(rounds: int) -> dict:
    """Everything that the report prints, with what it was measured on."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with torch.inference_mode():
        models, rows = model_figures(rounds)
        compared = method_rows(rounds)
        steps = {**step_figures(rounds), **clusters.cluster_figures(rounds)}
        figures = {**steps, **attention_figures(rounds), **models, **noise_free_figures()}
    trained, training = training_step.figures(DEIT_S, rounds)
    figures |= trained
    measured = {"figures": figures, "models": rows, "methods": compared, "training": training}
    return {**results.provenance(), "rounds": rounds, **measured}


def text(result: dict, gpu: dict[str, dict[str, float]]) -> str:
    """The report of a CPU result, followed by the GPU goals with their figures."""
    cpu = result["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return "\n".join(
        [
            f"{cpu['name']}, {cpu['isa']}, {cpu['threads']} thread; {versions}",
            f"commit {result['commit']}, {result['date']}, median of {result['rounds']} rounds; fp32,",
            f"DeiT-S, ToMe r = {R}, EViT keep rate 0.7",
            "",
            *goals.lines(goals.CPU, result["figures"]),
            "",
            *goals.lines(goals.GPU, gpu),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to save (default: benchmarks/results/<machine>.json)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--show", action="store_true", help="print the saved results, measure nothing")
    args = parser.parse_args(argv)
    cpu = machine.cpu()
    path = args.json or results.FOLDER / f"{results.slug(cpu['name'])}-{cpu['isa']}.json"
    if args.show:
        if not path.exists():
            parser.error(f"nothing was measured on this machine: no {path}")
        result = json.loads(path.read_text())
    else:
        result = measure(args.rounds)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(text(result, results.gpu_figures(results.saved())))
    failed = [goal.id for goal in goals.CPU if goal.verdict(result["figures"].get(goal.id)) == "FAIL"]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
