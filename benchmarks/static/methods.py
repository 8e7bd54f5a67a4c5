"""The kernels that a method adds to a block that reduces, counted on a DeiT-S of fake tensors on a fake GPU."""

from collections import Counter
from dataclasses import dataclass, replace

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tokred_kernels as tokred
from tokred_kernels import methods
from tokred_kernels._backend import TRITON_ONLY

from . import cuda, reasons, rows, triton
from .calls import KEEP, R
from .rows import FOLDER, MOST_LAUNCHES

BATCH, BLOCKS, AT = 64, 3, 1  # one block reduces
_OPTIONS = {"tome": {"r": [0, R, 0]}, "mctf": {"r": [0, R, 0]}}
_NO_KERNEL = ("_unsafe_view", "detach", "alias", "lift_fresh", "_reshape_alias", "promote_types")


@dataclass(frozen=True)
class MethodRow:
    method: str
    backend: str
    added: int  # kernels of the reduced model less those of the dense one, for the block that reduces
    kernels: str  # of the reduced model, those that the dense one has not
    note: str = ""

    @property
    def name(self) -> tuple:
        return self.method, self.backend

    def misses(self) -> list[str]:
        return [f"{self.added} kernels"] if self.added > MOST_LAUNCHES else []

    def worse_than(self, other: "MethodRow") -> list[str]:
        return ["added"] if self.added > other.added else []


class _Fused(TorchFunctionMode):
    """torch's fused attention is one kernel on a GPU; without one torch would take it apart."""

    def __init__(self, found: list) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.found.append(("sdpa", (), {}))
        return torch.empty_like(args[0])


class _Kernels(TorchDispatchMode):
    """(name, arguments) of everything that launches: no views, no empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if not func.is_view and func.namespace != "prim" and name not in _NO_KERNEL and "empty" not in name:
            self.found.append((f"{func.namespace}.{name}", args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _kernels(method: str | None) -> list[tuple[str, tuple, dict]]:
    """What a model launches, in order, ops of ours with their arguments."""
    model = timm.create_model("deit_small_patch16_224", depth=BLOCKS).bfloat16().eval()
    if method:
        options = _OPTIONS.get(method, {"keep_rate": KEEP, "stages": (AT,)})
        tokred.apply(model, method, **options)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"))
            for key, constant in module._buffers.items():
                module._buffers[key] = torch.empty(constant.shape, dtype=constant.dtype, device="cuda")
        images = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16, device="cuda")
        with _Kernels() as kernels, _Fused(kernels.found):
            model(images)
    return kernels.found


def _launches(backend: str, op: str, args: tuple, kwargs: dict) -> int:
    """Launches of an op of ours, by its launcher."""

    def real(value):
        is_tensor = isinstance(value, Tensor)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if is_tensor else value

    module = triton if op in TRITON_ONLY else {"cuda": cuda, "triton": triton}[backend]
    return module.count(op, *map(real, args), **{name: real(value) for name, value in kwargs.items()})


def _of(backend: str, kernels: list[tuple[str, tuple, dict]]) -> Counter:
    """Launches by name."""
    found = Counter()
    for name, args, kwargs in kernels:
        ours = name.removeprefix("tokred.")
        found[ours] += 1 if ours == name else _launches(backend, ours, args, kwargs)
    return found


def compute() -> list[MethodRow]:
    """Two rows a method."""
    dense, found = _kernels(None), []
    for method in methods.METHODS:
        reduced = _kernels(method)
        for backend in ("cuda", "triton"):
            before, after = _of(backend, dense), _of(backend, reduced)
            more = ", ".join(f"{count} {name}" for name, count in sorted((after - before).items()))
            row = MethodRow(method, backend, after.total() - before.total(), more)
            found.append(replace(row, note=reasons.of_method(row)))
    return found


def read() -> list[MethodRow]:
    return rows.read(FOLDER / "methods.csv", MethodRow)


def write(found: list[MethodRow]) -> None:
    rows.write(FOLDER / "methods.csv", found)
