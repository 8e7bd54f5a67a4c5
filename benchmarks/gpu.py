"""`make gpu`: on a machine with an NVIDIA GPU and nvcc, and no network, builds, tests, measures and sanitises.

Writes benchmarks/results/<gpu>.json after every step, and at the end the roofline beside it and README's table from it.
A step that fails is recorded with the end of its output, and those after it still run. One command stays under nine
minutes, which is not enough for everything: `make gpu ARGS=--resume` goes on where the last one stopped, and

    make gpu ARGS='--steps measure --only "DeiT-S|deit_small"'

does a part. Uses the Python that runs it, downloads nothing.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import goals, readme_table, results

SECONDS = 530  # for everything: nine minutes less the time to finish writing
TAIL = 20_000  # characters of a step's output that are kept
TOOLS = ("memcheck", "racecheck", "synccheck")
TESTS = {"tests": 200, "models": 120}  # of the ops, and of whole models
STEPS = ("build", *TESTS, "measure", *TOOLS)
ENVIRONMENT = {"TOKRED_BUILD": "cuda", "COLUMNS": "240"}  # a line of pytest's summary has room for its reason


@dataclass(frozen=True)
class Step:
    """A command ({seconds} stands for its time), the longest it may take, the time that must be left for it, and what
    is added to do again only what failed."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: float = 10.0
    again: tuple[str, ...] = ()


def plan(measured: Path, only: str = "", resume: bool = False) -> list[Step]:
    """What is done, in order; `measured` receives the figures."""
    python, sanitizer = sys.executable, find_sanitizer()
    # A test module that cannot be imported here (a missing package) must not keep the others from running.
    pytest = ("-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--continue-on-collection-errors", *in_parallel())
    # The measurement watches the clock itself, so that what it has is never lost.
    measure = [python, "-m", "benchmarks.gpu_measure", str(measured), "{seconds}", "--only", only]
    steps = [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 150),
        *(Step(name, (python, *pytest, *test_files(name)), limit, again=("--lf",)) for name, limit in TESTS.items()),
        Step("measure", (*measure, *(["--resume"] if resume else [])), SECONDS, needs=60),
    ]
    for tool in TOOLS if sanitizer else ():
        command = (sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "benchmarks.sanitize")
        steps.append(Step(tool, command, 240, needs=60))
    return steps


def test_files(step: str) -> list[str]:
    """The files with tests for a GPU, of the ops or of whole models. Collecting all others takes a minute."""
    mark = re.compile(r"^(@|pytestmark = ).*\bpytest\.mark\.gpu\b", re.M)
    marked = [path for path in (results.ROOT / "tests").glob("test_*.py") if mark.search(path.read_text())]
    wanted = [path for path in marked if path.name.startswith("test_gpu_") == (step == "tests")]
    return sorted(str(path.relative_to(results.ROOT)) for path in wanted)


def in_parallel() -> tuple[str, ...]:
    """pytest's options: most of the tests' time is the oracles and a thousand compilations by Triton, on the CPU.

    By worksteal: where a fault of the device ends a worker, xdist's loadgroup waits for it for ever.
    """
    if importlib.util.find_spec("xdist") is None:
        return ()
    return "-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"


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
    command = [part.replace("{seconds}", str(int(limit))) for part in step.command]
    start = time.monotonic()
    try:
        status, output = _watched(command, limit)
    except OSError as error:
        status, output = f"not started: {error}", b""
    tail = output.decode(errors="replace")[-TAIL:]
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "tail": tail}


def _watched(command: list[str], limit: float) -> tuple[str, bytes]:
    """How a command ended, and its output. Nothing that it started outlives it: it would disturb the next."""
    env = {**os.environ, **ENVIRONMENT}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=results.ROOT, env=env, start_new_session=True, **streams) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            return f"stopped after {limit:.0f} s", error.output or b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return "ok" if process.returncode == 0 else f"exit status {process.returncode}", output


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

    # The machine code that the wheel has and benchmarks/static counts: torch would name no intermediate code of 8.0.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
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
        before = done.get(step.name, {}).get("status") if resume else None
        if step.name not in chosen or before == "ok":
            continue
        if before == "exit status 1":  # of pytest: all has run, and something failed
            step = replace(step, command=step.command + step.again)
        elif before and before.startswith("stopped"):
            step = replace(step, limit=SECONDS)
        print(f"{step.name} ...", flush=True)
        step = replace(step, limit=SECONDS) if len(chosen) == 1 else step  # the command is its own
        outcome = run_step(step, deadline - time.monotonic())
        if step.name in TESTS:
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
