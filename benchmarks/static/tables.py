"""The committed tables of each backend: its launches, and what its calls launch and move."""

import itertools
from dataclasses import replace
from importlib.metadata import version

from . import cuda, machine_code, reasons, rows, triton
from .gpus import GPUS
from .rows import FOLDER, LaunchRow, StepRow

BACKENDS = ("cuda", "triton")
# What the committed tables were made with; another one gives other registers.
COMPILERS = {"cuda": "nvcc 13.0", "triton": "triton 3.6"}
Table = tuple[list[LaunchRow], list[StepRow]]


def compute(backend: str) -> Table:
    """The rows as the code is now."""
    module = {"cuda": cuda, "triton": triton}[backend]
    launch_rows, steps = [], []
    for call, gpu in itertools.product(module.all_calls(), GPUS):
        counted = gpu is GPUS[-1] and module.is_counted(call)  # grids differ between GPUs, bytes hardly
        launches = module.launches(call, gpu, counted)
        for i, launch in enumerate(launches):
            if launch.threads:  # torch's own kernels are counted in the step alone
                row = LaunchRow.of(call, gpu, i, launch)
                launch_rows.append(replace(row, note=reasons.of_launch(row)))
        if counted:
            row = StepRow.of(call, launches)
            steps.append(replace(row, note=reasons.of_step(backend, row)))
    return launch_rows, steps


def missing(backend: str) -> str | None:
    """Why the tables cannot be compared here, or None."""
    if backend == "cuda" and (reason := machine_code.missing()):
        return reason
    here = machine_code.compiler() if backend == "cuda" else f"triton {version('triton').rsplit('.', 1)[0]}"
    return None if here == COMPILERS[backend] else f"the tables are of {COMPILERS[backend]}, here is {here}"


def _paths(backend: str) -> tuple:
    return FOLDER / f"{backend}_launches.csv", FOLDER / f"{backend}_steps.csv"


def read(backend: str) -> Table:
    launches, steps = _paths(backend)
    return rows.read(launches, LaunchRow), rows.read(steps, StepRow)


def write(backend: str, table: Table) -> None:
    for path, found in zip(_paths(backend), table, strict=True):
        rows.write(path, found)


def differences(found: Table, committed: Table) -> list[str]:
    """What got worse than the committed table, and which rows came or went."""
    return [text for pair in zip(found, committed, strict=True) for text in rows.differences(*pair)]


def faults(table: Table) -> list[str]:
    """Rows that miss a goal without a reason, or spill."""
    return [f"{row.name}: {text}" for row in itertools.chain(*table) if not row.note for text in row.misses()] + [
        f"{row.name}: {row.spills} spills" for row in table[0] if row.spills
    ]
