"""The wheel of the sources as they are: pip builds it as for a user, once for each state of them."""

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
import toolkit  # noqa: E402

# Those of a release; intermediate code for what comes after them (12.0+PTX) would take 0.6 MB more.
ARCHITECTURES = "8.0;9.0;10.0;12.0"


def _digest() -> str:
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    for pattern in ("csrc/**/*.*", "build_backend/*.py", "tokred_kernels/**/*.py"):
        sources += sorted(ROOT.glob(pattern))
    home = toolkit.cuda_home()
    tools = f"{torch.__version__} {home and toolkit.nvcc_version(home)} {ARCHITECTURES}"
    return hashlib.sha256(b"".join(s.read_bytes() for s in sources) + tools.encode()).hexdigest()[:16]


def built() -> Path:
    """The wheel, in a folder of its own in .cache; with CUDA where there is an nvcc."""
    folder = ROOT / ".cache/wheel" / _digest()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # parallel test processes build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder]
            env = {**os.environ, "TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "TOKRED_BUILD": ""}
            done = subprocess.run([*command, ROOT], env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the wheel does not build:\n{done.stderr[-8000:]}")
    (found,) = folder.glob("*.whl")
    return found
