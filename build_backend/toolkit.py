"""The CUDA toolkit that setup.py compiles with, and for what."""

import glob
import os
import re
import shutil
import subprocess
from pathlib import Path


def cuda_home() -> str | None:
    """The toolkit of the first nvcc; a wrapper script on PATH would mislead torch's own search."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    homes += sorted(glob.glob("/usr/local/cuda-*"), reverse=True)
    return next((h for h in homes if h and Path(h, "bin/nvcc").exists() and Path(h, "include").is_dir()), None)


def nvcc_version(home: str) -> str:
    text = subprocess.check_output([f"{home}/bin/nvcc", "--version"], text=True)
    return re.search(r"release ([0-9.]+)", text)[1]


def why_no_cuda(torch, home: str | None) -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if home is None:
        return "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda*"
    version = nvcc_version(home).split(".")[0]
    if version != torch.version.cuda.split(".")[0]:
        return f"nvcc is {version}.x but torch was built for CUDA {torch.version.cuda}"
    return None


def gencode(architectures: str, newest: int = 80) -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST; none where it holds names, which torch knows.

    Intermediate code is made for 8.0 alone and serves all later ones: the machine code is as good, and what comes
    before ptxas is half of the compile time. newest: 90 where kernels use what 9.0 brought, for which both are made.
    """
    entries = architectures.replace(";", " ").split()
    if not all(re.fullmatch(r"\d+\.\d(\+PTX)?", entry) for entry in entries):
        return []
    codes: dict[int, list[str]] = {}
    for entry in entries:
        real = int(entry.removesuffix("+PTX").replace(".", ""))
        virtual = next((v for v in (newest, 80) if real >= v), real)
        codes.setdefault(virtual, []).append(f"sm_{real}")
        if entry.endswith("+PTX"):
            codes[virtual].append(f"compute_{virtual}")
    return [f"-gencode=arch=compute_{virtual},code=[{','.join(real)}]" for virtual, real in codes.items()]
