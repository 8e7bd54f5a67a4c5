"""Fixtures shared by all tests."""

import fcntl
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Two workers of two threads on two cores: threads that spin while they wait make the tests five times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKRED_POISON", "1")  # read once, by the first call of a CPU kernel
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker would start a compiler for every core
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from cases import ISAS

import tokred_kernels as tokred


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, with the reason, where there is no device."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # what they compare with, the CPU's float32, has 13 bits more
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):  # not the keywords: they hold the folder's name too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def threads():
    """What a test sets ends with it: sums of PyTorch depend on the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def lost_device(request):
    """After a fault of the device nothing runs in this process: xdist goes on in another, else the tests end here."""
    yield
    if request.node.get_closest_marker("gpu") is None:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{request.node.nodeid}: the device is lost: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the device is lost", 1)


@pytest.fixture
def gigabytes():
    """One test at a time, over all processes, takes as much of the device's memory as that."""
    with open(Path(tempfile.gettempdir()) / "tokred-gigabytes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory of torch's is NaN (floating) or the largest value (integer): an unwritten output shows.
    Outputs of our CPU kernels begin so in all tests, by TOKRED_POISON."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def _backends(*isas: str) -> list:
    found = [pytest.param(("reference", ""), id="reference")]
    for isa in isas:
        try:
            with tokred.use_backend("cpu", isa=isa):
                marks = ()
        except RuntimeError as error:
            marks = pytest.mark.skip(reason=str(error))
        found.append(pytest.param(("cpu", isa), id=isa, marks=marks))
    return found


@pytest.fixture(params=_backends(*(isa for isa in ISAS if isa != "amx")), scope="module")
def backend(request):
    """Every op by the reference, then by each instruction set of the CPU; amx has kernels of its own for attention."""
    name, isa = request.param
    with tokred.use_backend(name, isa=isa):
        yield name


@pytest.fixture(params=_backends(*ISAS), scope="module")
def attention_backend(request):
    """Attention by the reference, then by each instruction set of the CPU."""
    name, isa = request.param
    with tokred.use_backend(name, isa=isa):
        yield name
