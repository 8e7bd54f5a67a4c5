"""The committed tables of benchmarks/static against the code as it is: nothing got worse, every miss has its reason."""

import dataclasses

import pytest

from benchmarks.static import methods, rows, tables
from benchmarks.static.gpus import GPUS

HINT = "accept it with `python -m benchmarks.static --update`"


@pytest.fixture(scope="module", params=tables.BACKENDS)
def table(request):
    if reason := tables.missing(request.param):
        pytest.skip(reason)
    return request.param, tables.compute(request.param)


def test_nothing_got_worse(table):
    backend, found = table
    assert not tables.differences(found, tables.read(backend)), HINT


def test_every_miss_has_its_reason_and_nothing_spills(table):
    assert not tables.faults(table[1])


def test_kernels_that_methods_add():
    found = methods.compute()
    assert not rows.differences(found, methods.read()), HINT
    assert not [row.name for row in found if row.misses() and not row.note]


@pytest.mark.parametrize("field", ["registers", "spills", "shared"])
def test_a_worse_launch_is_seen(field):
    old = tables.read("cuda")[0]
    worse = [dataclasses.replace(old[0], **{field: getattr(old[0], field) + 8}), *old[1:]]
    assert [field in text for text in rows.differences(worse, old)] == [True]
    assert rows.differences(old, worse) == []  # better is fine
    assert len(rows.differences(old[1:], old)) == 1  # a row that went is not


@pytest.mark.parametrize("field", ["launches", "moved", "from_l2"])
def test_a_worse_step_is_seen(field):
    old = tables.read("triton")[1]
    worse = [dataclasses.replace(old[0], **{field: 2 * getattr(old[0], field)}), *old[1:]]
    assert [field in text for text in rows.differences(worse, old)] == [True]


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "on_a100", "on_h200"),
    [
        (256, 64, 10240, 4, 4),  # registers
        (128, 115, 41 << 10, 3, 4),  # shared memory, registers
        (1024, 32, 256, 2, 2),  # warps
        (32, 32, 0, 32, 32),  # blocks
        (256, 128, 62136, 2, 2),
    ],
)
def test_blocks_of_a_multiprocessor(threads, registers, shared, on_a100, on_h200):
    """As NVIDIA's occupancy calculator has it."""
    assert [gpu.resident(threads, registers, shared) for gpu in GPUS] == [on_a100, on_h200]
