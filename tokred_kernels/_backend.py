"""Which kernel runs where: loading, choosing, reporting. The dispatcher is the registry, nothing here is on a hot path.

CompositeExplicitAutograd   reference.py, any device
CPU                         csrc/cpu
CUDA                        csrc/cuda (_cuda) where it was built, else tokred_kernels/triton, else the reference
"""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.library import Library

from . import reference

CLUSTERING = ("pairwise_distance", "knn", "separation", "nearest", "medoids")
OPS = (
    "match",
    "merge",
    "add_merge_norm",
    "unmerge",
    "match_merge",
    "attention",
    "attention_backward",
    "attention_scores",
    "topk",
    "topk_gather",
    "add_topk_gather_norm",
    *CLUSTERING,
)
TRITON_ONLY = ("attention_backward", *CLUSTERING)  # no CUDA C++ form
BACKENDS = ("reference", "cpu", "cuda", "triton")

# What runs the attention of a patched block on each type of device: "tokred", our op, or "sdpa", torch's, with log size
# as a mask and attention_scores beside it. By what it has to do: plain, count sizes, emit scores. Elsewhere: sdpa.
ATTENTION = {
    # One core with AVX-512 and AMX, N = 197 and 577: 1.3 to 1.5 times torch's speed in float32, 1.4 to 1.7 times in
    # bfloat16, held to AVX2 1.1 to 1.3 times; scores cost 0 to 3 % (cls), 3 to 6 % (mean): benchmarks/cpu_attention.py.
    "cpu": {"plain": "tokred", "sized": "tokred", "scored": "tokred"},
    "cuda": {"plain": "sdpa", "sized": "tokred", "scored": "tokred"},  # not measured
}

_FOLDER = Path(__file__).parent


def _load(name: str, hint: str) -> None:
    try:
        torch.ops.load_library(_FOLDER / f"{name}.abi3.so")
    except OSError as error:
        why = error.__cause__ or error  # torch 2.13 says only which file
        raise ImportError(f"tokred_kernels/{name}.abi3.so does not load ({why}); {hint}") from error


def _load_cuda() -> str | None:
    """Loads _cuda; returns why it is not there, or None."""
    if not (_FOLDER / "_cuda.abi3.so").exists():
        return "the package was built without nvcc"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"  # libtorch_cuda is absent, so _cuda cannot load
    _load("_cuda", "rebuild it for this torch with `pip install .`, or leave it out with TOKRED_BUILD=cpu")
    return None


_load(
    "_C",
    f"build it with `pip install .` or `pip install -e .` in the source folder, with a C++ compiler and torch >= 2.10 "
    f"(this is torch {torch.__version__})",
)
_cuda_missing = _load_cuda()
_has_triton = importlib.util.find_spec("triton") is not None


def _triton(op: str) -> Callable:
    """The Triton launcher of an op, imported at its first call: importing Triton takes longer than importing us."""

    def launch(*args, **kwargs):
        module = importlib.import_module(f"tokred_kernels.triton.{op}")
        return getattr(module, f"{op}_triton")(*args, **kwargs)

    return launch


_library = Library("tokred", "IMPL")
for _op in OPS:
    _library.impl(_op, getattr(reference, _op), "CompositeExplicitAutograd")
    if _has_triton and (_cuda_missing or _op in TRITON_ONLY):
        _library.impl(_op, _triton(_op), "CUDA")
_selected: list[str] = []  # the use_backend contexts now open, innermost last


@contextlib.contextmanager
def use_backend(name: str, *, isa: str = "") -> Iterator[None]:
    """Runs every op on one backend, process-wide, inside a `with`: for tests and benchmarks.

    Args:
        name: "reference" (CPU and CUDA tensors), "cpu" (the C++ kernels, CPU tensors), "cuda" (the C++ kernels, CUDA
            tensors), "triton" (CUDA tensors; CPU tensors too under TRITON_INTERPRET=1).
        isa: with "cpu", the instruction set: "avx512", "avx2" or "portable"; default: the best of this machine.

    Raises:
        ValueError: an unknown name. RuntimeError: the backend or instruction set is not there, with the reason.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    if isa and name != "cpu":
        raise ValueError(f"use_backend: isa is for the backend cpu, got isa={isa!r} with {name!r}")
    if name == "cuda" and _cuda_missing:
        raise RuntimeError(f"use_backend: no CUDA C++ kernels: {_cuda_missing}")
    if name == "triton" and not _has_triton:
        raise RuntimeError("use_backend: triton is not installed")
    before = torch.ops.tokred.cpu_isa()
    if isa:
        torch.ops.tokred.cpu_isa(isa)
    override = Library("tokred", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding the registered kernel is the purpose
        for op in OPS:
            for key, kernel in _kernels(name, op):
                override.impl(op, kernel, key, allow_override=True)
    _selected.append(name)
    try:
        yield
    finally:
        _selected.remove(name)
        override._destroy()
        torch.ops.tokred.cpu_isa(before)


def _kernels(name: str, op: str) -> list[tuple[str, Callable]]:
    """The (dispatch key, kernel) pairs that put a backend in charge of an op."""
    if name == "reference":
        return [("CPU", getattr(reference, op)), ("CUDA", getattr(reference, op))]
    if name == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return [(key, _triton(op)) for key in (("CPU", "CUDA") if interpreted else ("CUDA",))]
    return []  # the C++ kernels are registered already


def info() -> dict[str, dict[str, str]]:
    """What runs for each op on each device, and why the others do not.

    Returns:
        {op: {"cpu": ..., "cuda": ...}} plus "reasons": {backend: why it does not run here}.
    """
    selected = _selected[-1] if _selected else None
    cpu = "reference" if selected == "reference" else f"cpu ({torch.ops.tokred.cpu_isa()})"

    def cuda(op: str) -> str:
        if selected in ("reference", "triton"):
            return selected
        if _cuda_missing or op in TRITON_ONLY:
            return "triton" if _has_triton else "reference"
        return "cuda"

    reasons = {}
    if _cuda_missing:
        reasons["cuda"] = _cuda_missing
    if not _has_triton:
        reasons["triton"] = "triton is not installed"
    if not torch.cuda.is_available():
        reasons["gpu"] = "torch sees no CUDA device"
    return {**{op: {"cpu": cpu, "cuda": cuda(op)} for op in OPS}, "reasons": reasons}


_chosen = os.environ.get("TOKRED_BACKEND")
if _chosen:
    _permanent = use_backend(_chosen)
    _permanent.__enter__()
