"""What a measurement was made with: versions, processor, devices."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from .. import __version__


def versions() -> dict[str, str | None]:
    """Versions of everything that takes part, None where it is not installed; imports nothing."""
    found = {"tokred_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("timm", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "cuda": torch.version.cuda}


def cpu() -> dict[str, str | int]:
    """Name, instruction set of our kernels, logical cores usable by this process and torch's threads."""
    return {
        "name": _cpu_name(),
        "isa": torch.ops.tokred.cpu_isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def gpus() -> list[dict[str, str]]:
    """Name and compute capability of each CUDA device."""
    return [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
        }
        for i in range(torch.cuda.device_count())
    ]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
