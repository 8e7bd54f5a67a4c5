"""`make gpu`: on a machine with an NVIDIA GPU and nvcc, and no network, builds, tests, measures and sanitises.

Writes benchmarks/results/<gpu>.json after every step, and at the end the roofline beside it and README's table from it.
A step that fails is recorded with the end of its output, and those after it still run. One command stays under nine
minutes, which is not enough for everything: `make gpu ARGS=--resume` goes on where the last one stopped, and

    make gpu ARGS='--steps measure --only "DeiT-S|deit_small"'

does a part. Uses the Python that runs it, downloads nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import goals, readme_table, results

SECONDS = 530  # for everything: nine minutes less the time to finish writing
TAIL = 4000  # characters of a step's output that are kept
TOOLS = ("memcheck", "racecheck", "synccheck")
STEPS = ("build", "tests", "measure", *TOOLS)


@dataclass(frozen=True)
class Step:
    """A command ({seconds} stands for its time), the longest it may take, and the time that must be left for it."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: float = 10.0


def plan(measured: Path, only: str = "", resume: bool = False) -> list[Step]:
    """What is done, in order; `measured` receives the figures."""
    python, sanitizer = sys.executable, find_sanitizer()
    # The measurement watches the clock itself, so that what it has is never lost.
    measure = [python, "-m", "benchmarks.gpu_measure", str(measured), "{seconds}", "--only", only]
    steps = [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 150),
        # A test module that cannot be imported here (a missing package) must not keep the others from running.
        Step("tests", (python, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors"), 180),
        Step("measure", (*measure, *(["--resume"] if resume else [])), SECONDS, needs=60),
    ]
    for tool in TOOLS if sanitizer else ():
        command = (sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "benchmarks.sanitize")
        steps.append(Step(tool, command, 240, needs=60))
    return steps


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *map(str, Path("/usr/local").glob("cuda-*"))]
    candidates = [shutil.which("compute-sanitizer"), *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    return next((path for path in candidates if path and Path(path).exists()), None)


def run_step(step: Step, seconds_left: float) -> dict:
    """Runs a step and says how it went: {"status", "seconds", "tail"}; never raises."""
    if seconds_left < step.needs:
        return {"status": f"not started: {seconds_left:.0f} s left", "seconds": 0.0, "tail": ""}
    limit = min(step.limit, seconds_left)
    start = time.monotonic()
    try:
        done = subprocess.run(
            [part.replace("{seconds}", str(int(limit))) for part in step.command],
            cwd=results.ROOT,
            env={**os.environ, "TOKRED_BUILD": "cuda"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
        )
        status = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = f"stopped after {limit:.0f} s", (error.output or b"").decode(errors="replace")
    except OSError as error:
        status, output = f"not started: {error}", ""
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "tail": output[-TAIL:]}


def outcomes(tail: str) -> dict[str, int]:
    """{"passed": 12, "failed": 1, ...} from the last line of pytest."""
    summary = [line for line in tail.splitlines() if re.search(r"\d+ (passed|failed|skipped|error|deselected)", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", summary[-1]) if summary else []
    return {outcome.rstrip("s") if outcome.startswith("error") else outcome: int(count) for count, outcome in found}


def failures(result: dict) -> list[str]:
    """Names of the steps that did not go well."""
    return [name for name, step in result["steps"].items() if step["status"] != "ok"]


def finish(path: Path, result: dict) -> None:
    """Draws the roofline and writes README's table, if the result is where README looks for it."""
    from . import roofline

    if result.get("kernels"):
        print(f"{roofline.draw(result, path.with_suffix('.png'))} calls in {path.with_suffix('.png')}")
    if path.parent == results.FOLDER:
        readme_table.main([])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to save (default: benchmarks/results/<gpu>.json)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="do these alone")
    parser.add_argument("--only", default="", metavar="PATTERN", help="measure the parts whose name matches")
    parser.add_argument("--resume", action="store_true", help="leave out what went well before, at this commit")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + SECONDS
    try:
        import torch
    except ImportError:
        parser.error("torch is not installed in this Python")
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no NVIDIA GPU")

    path = args.json.resolve() if args.json else results.FOLDER / f"{results.slug(torch.cuda.get_device_name())}.json"
    result = carry_out(path, plan(path, args.only, args.resume), args.steps, args.resume, deadline)
    print("\n".join(goals.lines(goals.GPU, result.get("figures", {}))))
    finish(path, result)
    print(f"saved {path}")
    missing = [*failures(result), *(name for name, how in result.get("parts", {}).items() if how != "ok")]
    if missing:
        print(f"to go on with {', '.join(missing[:5])}{', ...' * (len(missing) > 5)}: make gpu ARGS=--resume")
    return 1 if missing else 0


def carry_out(path: Path, steps: list[Step], chosen: Sequence[str], resume: bool, deadline: float) -> dict:
    """Runs the chosen steps, saving after each. What the file holds of other steps stays, if it is of this commit."""
    commit = results.commit()
    old = json.loads(path.read_text()) if path.exists() else {}
    done = old.get("steps", {}) if old.get("commit") == commit else {}
    for step in steps:
        if step.name not in chosen or (resume and done.get(step.name, {}).get("status") == "ok"):
            continue
        print(f"{step.name} ...", flush=True)
        step = replace(step, limit=SECONDS) if len(chosen) == 1 else step  # the command is its own
        outcome = run_step(step, deadline - time.monotonic())
        if step.name == "tests":
            outcome["counts"] = outcomes(outcome["tail"])
        done[step.name] = outcome
        save(path, commit, done)
        print(f"{step.name}: {outcome['status']}, {outcome['seconds']} s {outcome.get('counts', '')}", flush=True)
        if outcome["status"] != "ok":
            print(outcome["tail"][-1500:], flush=True)
    return json.loads(path.read_text())


def save(path: Path, commit: str, steps: dict) -> None:
    """The steps, beside what the measurement wrote into the file at this commit."""
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("commit") != commit:
        result = {"commit": commit, "figures": {}, "parts": {}}
    path.write_text(json.dumps({**result, "steps": steps}, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
