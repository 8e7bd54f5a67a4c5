"""Measures the CPU goals and prints them with their gates; prints the GPU goals from saved results.

    python -m benchmarks.report                      measure, print, save benchmarks/results/<machine>.json
    python -m benchmarks.report --show               print what was saved

One thread, variants interleaved in one process, ratios of the fastest of 15 rounds; nothing is timed before its result
was compared with the reference.
"""

import argparse
import json
from pathlib import Path

import timm
import torch

from tokred_kernels import schedule
from tokred_kernels.cli import images, machine, variants
from tokred_kernels.cli.timing import interleave, keep_freed_memory

from . import cases, goals, noise_free, results

MODEL, R = "deit_small_patch16_224", 13
BATCHES = (1, 8)


def step_figures(rounds: int) -> dict[str, dict[str, float]]:
    """C1, C2, C6: one reduction step."""
    torch.manual_seed(0)
    block = timm.create_model(MODEL).eval().blocks[0]
    compiled = torch.compile(cases.OPS["match_merge"][1], dynamic=False)
    figures = {"C1": {}, "C2": {}, "C6": {}}
    for B in BATCHES:
        given = cases.inputs(cases.Shape("deit_small", B, 197, 6, R))
        call, eager = cases.OPS["match_merge"]
        candidates = {
            "ours": lambda call=call, given=given: call(given),
            "eager": lambda eager=eager, given=given: eager(given),
            "compiled": lambda given=given: compiled(given),
            "block": lambda given=given: block(given.x),
        }
        for name in ("ours", "eager", "compiled"):
            cases.check("match_merge", given, candidates[name]())
        seconds = {name: timing.best for name, timing in interleave(candidates, rounds=rounds).items()}
        figures["C1"][f"B={B}"] = seconds["eager"] / seconds["ours"]
        figures["C2"][f"B={B}"] = seconds["compiled"] / seconds["ours"]
        figures["C6"][f"B={B}"] = 100 * seconds["ours"] / seconds["block"]
    return figures


def model_figures(rounds: int) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """C7, C9 and C10's ops, and the rows of the model table."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    found = variants.build(model, "tome", r=R)
    _, photographs = images.load([], model)
    figures, table = {"C7": {}, "C9": {}}, []
    for B in BATCHES:
        batch = photographs[torch.arange(B) % len(photographs)]
        checked = variants.verify(found, "tome", batch, B)
        if not checked["passed"]:
            raise SystemExit(f"the results disagree, nothing was timed: {checked}")
        rows = variants.rows(variants.measure(found, batch, rounds=rounds), "tome", "cpu", B)
        figures["C7"][f"B={B}"] = rows["tome"]["re_sdpa"]
        figures["C9"][f"B={B}"] = rows["plain_explicit"]["seconds_min"] / rows["tome"]["seconds_min"]
        ideal = schedule.macs(model) / schedule.macs(found["tome"])
        table.append({"model": MODEL, "r": R, "batch_size": B, "ideal_speedup": ideal, "variants": rows})
    added = noise_free.ops_per_step(model, found["tome"], photographs, len(model.blocks))
    figures["C10 ops"] = {"tome": added}
    return figures, table


def noise_free_figures() -> dict[str, dict[str, float]]:
    """C10's bytes and bits, of each op."""
    figures = {"C10 bytes": {}, "C10 bitwise": {}}
    given = cases.inputs(cases.Shape("deit_small", 8, 197, 6, R))
    for op in ("match", "merge", "match_merge"):
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
        models, table = model_figures(rounds)
        figures = {**step_figures(rounds), **models, **noise_free_figures()}
    return {**results.provenance(), "rounds": rounds, "figures": figures, "models": table}


def text(result: dict, gpu: dict[str, dict[str, float]]) -> str:
    """The report of a CPU result, followed by the GPU goals with their figures."""
    cpu = result["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return "\n".join(
        [
            f"{cpu['name']}, {cpu['isa']}, {cpu['threads']} thread; {versions}",
            f"commit {result['commit']}, {result['date']}, fastest of {result['rounds']} rounds; DeiT-S, r = {R}, fp32",
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
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(text(result, results.gpu_figures(results.saved())))
    failed = [goal.id for goal in goals.CPU if goal.verdict(result["figures"].get(goal.id)) == "FAIL"]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
