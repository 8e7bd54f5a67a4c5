"""Compiles what the Triton launchers launch for GPUs that are not here, and reads the machine code.

A launcher is run on CPU tensors with JITFunction.run replaced by a recorder, so that the variants that are compiled are
the variants that are launched: specialised as Triton does it, with the constants and options the launcher chose.
"""

import collections
import hashlib
import importlib
import math
import os
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from unittest import mock

import torch
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, mangle_type

from tokred_kernels.triton import _attention

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "triton"
_TOOLS = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Launch:
    """One kernel variant: everything by which Triton tells compilations apart."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]  # parameter, type
    constants: tuple[tuple[int, object], ...]
    aligned: tuple[int, ...]  # parameters divisible by 16
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def id(self) -> str:
        pointers = [kind[1:] for _, kind in self.signature if kind.startswith("*")]
        constants = {self.signature[i][0]: value for i, value in self.constants if value is not None}
        return "-".join([self.name, pointers[0], *(f"{n}{v}" for n, v in constants.items())])


def _describe(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    names = {parameter.name for parameter in kernel.params}
    bound = kernel.signature.bind(*args, **{n: v for n, v in kwargs.items() if n in names}).arguments
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        value, specialize = bound[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialize):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.num, value))
            continue
        signature.append((parameter.name, mangle_type(value)))
        bits = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if specialize and isinstance(bits, int) and bits % 16 == 0:
            aligned.append(parameter.num)
    options = tuple(sorted((n, v) for n, v in kwargs.items() if n not in names))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


def plan(op: str, *args, **kwargs) -> list[tuple[Launch, int]]:
    """The kernels that `<op>_triton(*args, **kwargs)` launches, in order, and their programs; nothing runs."""
    found = []

    def record(self, *args, grid, warmup, **kwargs):
        found.append((_describe(self, args, kwargs), math.prod(grid)))

    launcher = getattr(importlib.import_module(f"tokred_kernels.triton.{op}"), f"{op}_triton")
    with mock.patch.object(JITFunction, "run", record):
        launcher(*args, **kwargs)
    return found


def launches(op: str, *args, **kwargs) -> list[Launch]:
    """The kernels of plan."""
    return [launch for launch, _ in plan(op, *args, **kwargs)]


def compile_for(launch: Launch, target: str) -> CompiledKernel:
    """Compiled, or taken from the cache in the repository (keyed by source, target, options and compiler)."""
    float32 = tl.constexpr("ieee" if target == "gfx942" else "tf32x3")
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(i,): value for i, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(CACHE)), mock.patch.object(_attention, "FLOAT32", float32):
        return triton_compile(source, target=TARGETS[target], options=dict(launch.options))


@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int  # instructions that touch local memory, and bytes of stack
    shared: int  # bytes
    loads: int  # instructions that read global memory
    stores: int
    products: int  # tensor-core instructions


def resources(kernel: CompiledKernel, target: str) -> Resources:
    shared = kernel.metadata.shared
    if target == "gfx942":
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        def count(pattern: str) -> int:
            return len(re.findall(rf"^\s+{pattern}", text, re.M))

        # Scalar registers spill into lanes of a vector register: without a private segment, not to memory.
        spills = field("vgpr_spill_count") + field("private_segment_fixed_size")
        loads, stores = count("(?:buffer|global)_load"), count("(?:buffer|global)_store")
        return Resources(field("vgpr_count"), spills, shared, loads, stores, count("v_mfma"))

    usage, code = _disassembled(kernel.asm["cubin"])
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # A line is `/*0070*/  @!P0 LDG.E.128 R4, ... ;`.
    mnemonics = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.M)
    of = collections.Counter(mnemonics)
    spills = stack + of["LDL"] + of["STL"]  # LOCAL of cuobjdump shows 0 even where thousands of them exist
    loads = of["LDG"] + of["LDGSTS"] + of["UTMALDG"]
    return Resources(registers, spills, shared, loads, of["STG"], of["HMMA"] + of["HGMMA"] + of["UTCHMMA"])


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of the resources, and the instructions; kept beside the compilations, by content."""
    path = CACHE / f"{hashlib.sha256(cubin).hexdigest()}.sass"
    if not path.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            calls = ["cuobjdump", "-res-usage", file.name], ["nvdisasm", "-c", file.name]
            texts = [subprocess.run([_TOOLS / c[0], *c[1:]], capture_output=True, text=True, check=True) for c in calls]
        path.write_text("\0".join(t.stdout for t in texts))
    usage, code = path.read_text().split("\0")
    return usage, code
