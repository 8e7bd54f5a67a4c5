"""The emulated CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and the proof that
these and the emulator catch planted bugs."""

import functools
import subprocess

import pytest
from simt.build import FLAVOURS, PROGRAMS, build

EXECUTABLES = [f"{program}_{flavour}.exe" for program in PROGRAMS for flavour in FLAVOURS]


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([build(*EXECUTABLES) / program, *arguments], capture_output=True, text=True, timeout=300)


@functools.cache
def hashes(program: str) -> str:
    """One line an output of the plain build, threads in order."""
    done = run(f"{program}_plain.exe", "0")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("flavour, seed", [(f, s) for f in FLAVOURS for s in "012" if f != "thread" or s == "1"])
@pytest.mark.parametrize("program", PROGRAMS[:2])
def test_kernels_are_clean_and_do_not_depend_on_the_schedule(program, flavour, seed):
    done = run(f"{program}_{flavour}.exe", seed)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[:4000]
    assert done.stdout == hashes(program)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_planted_kernel_is_clean_without_a_bug(flavour):
    done = run(f"planted_{flavour}.exe", "none", "1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "flavour, bug, found",
    [
        ("thread", "missing-barrier", "data race"),
        ("thread", "missing-warp-barrier", "data race"),
        ("address", "out-of-bounds", "heap-buffer-overflow"),
        ("address", "shared-out-of-bounds", "heap-buffer-overflow"),
        ("plain", "divergent-barrier", "threads wait at different barriers"),
        ("plain", "returned", "a barrier that some threads do not reach"),
        ("plain", "wrong-mask", "a shuffle reads a lane outside its mask"),
        ("plain", "uninitialised", "wrong:"),
        ("plain", "missing-wait", "threads return that did not wait for the launch before"),
        ("plain", "lone-wait", "threads return that did not wait for the launch before"),
        ("plain", "early-read", "wrong:"),
        ("plain", "early-write", "memory is written before the wait"),
        ("thread", "early-read", "data race"),
        ("thread", "early-write", "data race"),
    ],
)
@pytest.mark.parametrize("seed", ["0", "1"])
def test_planted_bugs_are_caught(flavour, bug, found, seed):
    done = run(f"planted_{flavour}.exe", bug, seed)
    assert done.returncode != 0
    assert found in done.stdout + done.stderr
