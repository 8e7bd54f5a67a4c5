"""Builds _C (schema and CPU kernels) and, with nvcc, _cuda. TOKRED_BUILD=cuda insists on CUDA, cpu does without."""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "tokred_kernels/__init__.py").read_text())[1]


def cuda_home() -> str | None:
    """The toolkit of the first nvcc; a wrapper script on PATH would mislead torch's own search."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    homes += sorted(glob.glob("/usr/local/cuda-*"), reverse=True)
    return next((h for h in homes if h and Path(h, "bin/nvcc").exists() and Path(h, "include").is_dir()), None)


def why_no_cuda(torch, home: str | None) -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if home is None:
        return "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda*"
    version = re.search(r"release (\d+)", subprocess.check_output([f"{home}/bin/nvcc", "--version"], text=True))[1]
    if version != torch.version.cuda.split(".")[0]:
        return f"nvcc is {version}.x but torch was built for CUDA {torch.version.cuda}"
    return None


def extensions():
    if {"sdist", "egg_info", "dist_info"} & set(sys.argv):
        return [], {}  # metadata alone: asked for before a torch is there
    compiler = os.environ.get("CXX", "").split()[:1] or [c for c in ("c++", "g++", "clang++") if shutil.which(c)]
    if not compiler or not shutil.which(compiler[0]):
        sys.exit("tokred_kernels: no C++ compiler found; install one (Debian, Ubuntu: apt-get install g++) or set CXX")
    mode = os.environ.get("TOKRED_BUILD", "")
    if mode not in ("", "cpu", "cuda"):
        sys.exit(f"tokred_kernels: TOKRED_BUILD must be cpu or cuda, got {mode!r}")

    import torch

    home = cuda_home()
    reason = "TOKRED_BUILD=cpu" if mode == "cpu" else why_no_cuda(torch, home)
    if reason and mode == "cuda":
        sys.exit(f"tokred_kernels: TOKRED_BUILD=cuda, but {reason}")
    if reason:
        print(f"tokred_kernels: CUDA kernels left out: {reason}", flush=True)
    else:
        os.environ["CUDA_HOME"] = home
        if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0+PTX"
        print(f"tokred_kernels: CUDA kernels built with {home}/bin/nvcc", flush=True)
    from torch.utils import cpp_extension

    common = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    host = ["-g0", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=."]

    def extension(name, sources, libraries, define=(), **kwargs):
        return Extension(
            f"tokred_kernels.{name}",
            sorted(sources),
            include_dirs=cpp_extension.include_paths("cuda" if name == "_cuda" else "cpu"),
            library_dirs=cpp_extension.library_paths("cuda" if name == "_cuda" else "cpu"),
            libraries=libraries,
            extra_compile_args={
                "cxx": [*common, *host, *define],
                "nvcc": [*common, *define, "--compress-mode=size", "--expt-relaxed-constexpr"]
                + [f"-Xcompiler={flag}" for flag in host],
            },
            extra_link_args=["-Wl,-s"],
            py_limited_api=True,
            language="c++",
            **kwargs,
        )

    built = [extension("_C", ["csrc/ops.cpp", *glob.glob("csrc/cpu/*.cpp")], ["torch", "torch_cpu"])]
    if not reason and glob.glob("csrc/cuda/*.cu"):
        libraries = ["torch", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl"]
        built.append(extension("_cuda", glob.glob("csrc/cuda/*.cu"), libraries, ["-DUSE_CUDA"]))
    return built, {"build_ext": cpp_extension.BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    version=VERSION,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
