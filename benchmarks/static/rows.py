"""The rows of the tables: what a launch takes, what a call moves; and which of two rows is worse."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .calls import Call
from .gpus import Gpu

FOLDER = Path(__file__).parent
# What must hold, or have its reason in the row.
MOST_LAUNCHES, MOST_BYTES, LEAST_OCCUPANCY = 2, 1.3, 0.5


@dataclass(frozen=True)
class Launch:
    """A launch as a backend reports it; bytes."""

    kernel: str
    blocks: int
    threads: int
    registers: int
    spills: int  # instructions that touch local memory, and bytes of stack
    shared: int  # static and dynamic
    read: int = 0  # each sector once a launch
    written: int = 0
    from_l2: int = 0  # read, each sector once a block


@dataclass(frozen=True)
class LaunchRow:
    op: str
    form: str
    shape: str
    gpu: str
    launch: int
    kernel: str
    blocks: int
    threads: int
    registers: int
    spills: int
    shared: int
    resident: int  # blocks a multiprocessor holds
    occupancy: float
    waves: float
    note: str = ""

    @property
    def name(self) -> tuple:
        return self.op, self.form, self.shape, self.gpu, self.launch

    @classmethod
    def of(cls, call: Call, gpu: Gpu, index: int, launch: Launch) -> "LaunchRow":
        needs = launch.threads, launch.registers, launch.shared
        resident = gpu.resident(*needs)
        waves = launch.blocks / (gpu.multiprocessors * resident)
        return cls(
            *call.id, gpu.name, index, launch.kernel, launch.blocks, launch.threads, launch.registers, launch.spills,
            launch.shared, resident, round(gpu.occupancy(*needs), 3), round(waves, 2),
        )  # fmt: skip

    def misses(self) -> list[str]:
        """Goals that need a reason."""
        return [f"occupancy {self.occupancy}"] if self.occupancy < LEAST_OCCUPANCY else []

    def worse_than(self, other: "LaunchRow") -> list[str]:
        """The fields in which a kernel takes more, registers by the eights in which they are given."""
        found = [name for name in ("spills", "shared") if getattr(self, name) > getattr(other, name)]
        if -(-self.registers // 8) > -(-other.registers // 8):
            found.append("registers")
        return found + ["occupancy"] * (self.occupancy < other.occupancy)


@dataclass(frozen=True)
class StepRow:
    op: str
    form: str
    shape: str
    launches: int
    moved: int  # bytes: of each launch, every sector read and every sector written once
    from_l2: int  # bytes: read, every sector once a block
    floor: int  # bytes
    ratio: float  # moved / floor
    flops: int
    note: str = ""

    @property
    def name(self) -> tuple:
        return self.op, self.form, self.shape

    @classmethod
    def of(cls, call: Call, launches: list[Launch]) -> "StepRow":
        moved = sum(launch.read + launch.written for launch in launches)
        from_l2 = sum(launch.from_l2 for launch in launches)
        ratio = round(moved / call.floor, 3)
        return cls(*call.id, len(launches), moved, from_l2, call.floor, ratio, call.flops)

    def misses(self) -> list[str]:
        """Goals that need a reason."""
        many = [f"{self.launches} launches"] if self.launches > MOST_LAUNCHES else []
        return many + ([f"{self.ratio} times the floor"] if self.ratio > MOST_BYTES else [])

    def worse_than(self, other: "StepRow") -> list[str]:
        found = ["launches"] * (self.launches > other.launches)
        # A sector in a hundred may come from where the host put the tensors.
        return found + [n for n in ("moved", "from_l2") if getattr(self, n) > 1.01 * getattr(other, n)]


def write(path: Path, rows: Iterable) -> None:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path, kind: type) -> list:
    with path.open(newline="") as file:
        return [kind(**{f.name: f.type(row[f.name]) for f in fields(kind)}) for row in csv.DictReader(file)]


def differences(found: Iterable, committed: Iterable) -> list[str]:
    """What got worse, and which rows came or went."""

    def by_key(rows) -> dict:
        return {row.name: row for row in rows}

    found, committed = by_key(found), by_key(committed)
    texts = [f"{key} is not in the table" for key in found.keys() - committed.keys()]
    texts += [f"{key} is in the table alone" for key in committed.keys() - found.keys()]
    for key in found.keys() & committed.keys():
        for name in found[key].worse_than(committed[key]):
            texts.append(f"{key}: {name} {getattr(committed[key], name)} -> {getattr(found[key], name)}")
    return sorted(texts)
