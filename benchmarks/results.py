"""Saved measurements: where they are, and what they were made with. Usable before the package is built."""

import datetime
import json
import re
import subprocess
from pathlib import Path

from . import goals

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def saved() -> list[dict]:
    """All saved results that hold figures."""
    found = (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
    return [result for result in found if result["figures"]]


def gpu_figures(results: list[dict]) -> dict[str, dict[str, float]]:
    """The figures of the newest result that has any of the GPU goals."""
    ids = {goal.id for goal in goals.GPU}
    with_gpu = [result for result in results if ids & result["figures"].keys()]
    return max(with_gpu, key=lambda result: result["date"])["figures"] if with_gpu else {}


def commit() -> str:
    """The commit that is checked out, and whether files differ from it; results are not counted."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # a rented machine may have neither git nor a repository
            return ""

    # A measurement writes these two itself.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!README.md")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def provenance() -> dict:
    """Machine, versions, commit and day of a measurement."""
    from tokred_kernels.cli import machine

    return {
        "cpu": machine.cpu(),
        "gpus": machine.gpus(),
        "versions": machine.versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
