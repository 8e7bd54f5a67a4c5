"""Measures the GPU goals part by part and saves after each: `python -m benchmarks.gpu_measure FILE SECONDS`.

--only PATTERN measures the parts whose name matches, --resume those that FILE lacks; --list prints the names. What FILE
holds of other parts stays if it is of this commit, so that any number of commands fill one file.
"""

import argparse
import itertools
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import gpu_models as m
from . import gpu_ops, results
from .gpu_device import Gpu
from .gpu_ops import Part

Parts = list[tuple[str, float, Callable[[Gpu], Part]]]


def parts() -> Parts:
    """(name, seconds that must be left for it, what measures it): the most wanted first."""
    goals_first = [
        ("steps", 30, gpu_ops.steps),
        _row(m.DEIT_S, *m.TOME, 256),
        _row(m.DEIT_S, *m.TOME, 64),
        _row(m.DEIT_B, *m.TOME, 256),
        _row(m.VIT_L, "tome", {"r": 8}, 64),
        _row(m.DEIT_S, *m.TOME, 8),
        _row(m.DEIT_S, *m.TOME, 1),
        ("attention", 30, gpu_ops.attention),
        ("training", 40, m.training),
        ("mctf", 20, m.mctf),
        ("projected metric", 20, m.projected),
        _compiled(m.DEIT_S, *m.TOME, 256),
        ("compiled steps", 60, gpu_ops.compiled_steps),
        ("noise free", 90, m.noise_free),
        _compiled(m.DEIT_S, *m.TOME, 256, "plain_sdpa"),
        _compiled(m.DEIT_S, *m.TOME, 256, "plain_explicit"),
        _compiled(m.DEIT_S, "tome", {"r": 16}, 256),
        _compiled(m.DEIT_S, *m.EVIT, 256),
        _compiled(m.VIT_L, "tome", {"r": 8}, 64),
        ("kernels", 90, gpu_ops.kernels),
    ]
    grid = list(_rows()) + [_compiled(m.DEIT_S, *m.TOME, B) for B in (1, 8)]
    named = {name for name, *_ in goals_first}
    return goals_first + [part for part in grid if part[0] not in named]


def _row(model: str, method: str, options: dict, B: int) -> tuple:
    large = model in (m.DEIT_B, m.VIT_L) and B >= 64
    return f"row {model} {method} {m.named(options)} B={B}", 40 if large else 15, m.row(model, method, options, B)


def _rows() -> Iterator[tuple]:
    for model, B in itertools.product((m.DEIT_S, m.DEIT_B, m.DEIT_T, m.VIT_L), (256, 64, 8, 1)):
        for method, options in m.OPTIONS:
            if not m.removes_too_much(model, options):
                yield _row(model, method, options, B)


def _compiled(model: str, method: str, options: dict, B: int, other: str = "dense") -> tuple:
    name = f"compiled {model} {method} {m.named(options)} B={B} against {other}"
    return name, 180 if model == m.VIT_L else 110, m.compiled(model, method, options, B, other)


def started(path: Path) -> dict:
    """The result to go on with: what the file holds, if it is of this commit and device, else a new one."""
    new = {**results.provenance(), "figures": {}, "models": [], "kernels": [], "raw": {}, "parts": {}}
    old = json.loads(path.read_text()) if path.exists() else {}
    if all(old.get(key) == new[key] for key in ("commit", "gpus", "versions")):
        return {**new, **old}
    return new


def collect(path: Path, seconds: float, todo: Parts, gpu: Gpu, resume: bool = False) -> dict:
    """Measures part after part, saving after each; "parts" says "ok" of each, or why not."""
    deadline = time.monotonic() + seconds
    result = started(path)
    for name, needs, measure in todo:
        if resume and result["parts"].get(name) == "ok":
            continue
        if deadline - time.monotonic() < needs:
            result["parts"].setdefault(name, "no time left")
        else:
            print(name, flush=True)
            try:
                _add(result, *measure(gpu))
                result["parts"][name] = "ok"
            except Exception as error:
                result["parts"][name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _add(result: dict, figures: gpu_ops.Figures, more: dict) -> None:
    """What a part found, in place of what it found before."""
    for goal, figure in figures.items():
        result["figures"].setdefault(goal, {}).update(figure)
    rows = more.pop("models", [])
    result["models"] = [old for old in result["models"] if not any(_same_row(old, row) for row in rows)] + rows
    result["kernels"] = more.pop("kernels", result["kernels"])
    result["raw"] |= more


def _same_row(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("model", "method", "options", "batch_size"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_measure", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("seconds", type=float, nargs="?", default=530)
    parser.add_argument("--only", default="", metavar="PATTERN", help="measure the parts whose name matches")
    parser.add_argument("--resume", action="store_true", help="leave out what FILE has of this commit")
    parser.add_argument("--list", action="store_true", help="print the parts")
    args = parser.parse_args(argv)
    todo = [part for part in parts() if re.search(args.only, part[0])]
    if args.list:
        print("\n".join(name for name, *_ in todo))
        return 0
    if args.file is None or not todo:
        parser.error("FILE is missing" if args.file is None else f"no part matches {args.only!r}")
    with torch.no_grad():
        result = collect(args.file, args.seconds - 10, todo, Gpu(), args.resume)
    return 1 if any(result["parts"].get(name) != "ok" for name, *_ in todo) else 0


if __name__ == "__main__":
    raise SystemExit(main())
