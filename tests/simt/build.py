"""Builds the emulator with ninja: the Python module, and programs in four flavours. Kept by source hash in .cache."""

import fcntl
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc/cuda"
SOURCES = sorted(
    [*HERE.glob("*.h"), *HERE.glob("*.cpp"), *KERNELS.glob("*.cuh"), KERNELS / "batches.h", Path(__file__)]
)
# The scheduler is never instrumented for ThreadSanitizer: it would report its own bookkeeping.
FLAVOURS = {
    "plain": ("", ""),
    "address": ("-fsanitize=address -g1", "-fsanitize=address -g1"),
    "undefined": ("-fsanitize=undefined -fno-sanitize-recover -g1", ""),
    "thread": ("-fsanitize=thread -g1", "-DSIMT_TSAN"),
}
PROGRAMS = ("cases", "attention_cases", "planted")
# As nvcc: no contraction (fmaf alone is a fused product, so every flavour and every host rounds alike), no type-based
# aliasing.
FLAGS = "-std=c++17 -march=native -ffp-contract=off -fno-strict-aliasing -Wall -Wno-unknown-pragmas"


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja") or "ninja"


def _rules(out: Path) -> str:
    import pybind11

    includes = f"-I{HERE} -I{KERNELS}"
    python = f"-fPIC -fvisibility=hidden -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    text = [
        f"builddir = {out}",
        "rule compile\n  command = g++ $flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = g++ $flags $in -o $out",
    ]

    def compile_(name: str, source: str, flags: str) -> str:
        text.append(f"build {out}/{name}.o: compile {HERE}/{source}\n  flags = {FLAGS} {includes} {flags}")
        return f"{out}/{name}.o"

    module = [compile_("module", "module.cpp", f"-O2 {python}"), compile_("module_simt", "simt.cpp", f"-O2 {python}")]
    text.append(f"build {out}/simt_kernels.so: link {' '.join(module)}\n  flags = -shared")
    # Symbols are visible: a launch is known by the name of its kernel. Not unique ones: both modules may be loaded.
    counting = f"{python.replace(' -fvisibility=hidden', '')} -fno-gnu-unique -DSIMT_COUNTING"
    counted = [compile_("module_counting", "module.cpp", f"-O1 -fsanitize=thread {counting}")]
    counted += [compile_(f"{name}_counting", f"{name}.cpp", f"-O2 {counting}") for name in ("simt", "counting")]
    text.append(f"build {out}/simt_counting.so: link {' '.join(counted)}\n  flags = -shared")
    for flavour, (kernel, scheduler) in FLAVOURS.items():
        simt = compile_(f"simt_{flavour}", "simt.cpp", f"-O2 {scheduler}")
        for program in PROGRAMS:
            main = compile_(f"{program}_{flavour}", f"{program}.cpp", f"-O1 {kernel}")
            text.append(f"build {out}/{program}_{flavour}.exe: link {main} {simt}\n  flags = {kernel}")
    return "\n".join(text) + "\n"


def build(*targets: str) -> Path:
    """The folder that holds the targets, e.g. "simt_kernels.so", "cases_thread.exe"."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in SOURCES)).hexdigest()[:16]
    out = ROOT / ".cache/simt" / digest
    if all((out / t).exists() for t in targets):
        return out
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:  # parallel test processes build once, not into each other's files
        fcntl.flock(lock, fcntl.LOCK_EX)
        failure = out / "failure.txt"
        if not failure.exists():  # the same sources fail the same way for every test
            (out / "build.ninja").write_text(_rules(out))
            command = [_ninja(), "-f", str(out / "build.ninja"), *(str(out / t) for t in targets)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                failure.write_text(f"{done.stdout[-8000:]}{done.stderr[-2000:]}")
        if failure.exists():
            raise RuntimeError(f"the emulator does not build:\n{failure.read_text()}")
    return out


@functools.cache
def emulator(name: str = "simt_kernels"):
    """The Python module with the emulated kernels; simt_counting is counting.py's."""
    path = build(f"{name}.so") / f"{name}.so"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
