"""Builds _C (schema and CPU kernels) and, with nvcc, _cuda. TOKRED_BUILD=cuda insists on CUDA, cpu does without."""

import glob
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from toolkit import cuda_home, gencode, why_no_cuda  # noqa: E402

# What begins before its predecessor has ended, and that one: made for 9.0 too (csrc/cuda/dependent.cuh).
DEPENDENT = {f"csrc/cuda/{op}_kernel.cu" for op in ("match", "merge", "topk", "topk_gather")}
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "tokred_kernels/__init__.py").read_text())[1]


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

    class BuildExtension(cpp_extension.BuildExtension):
        """nvcc's options by the file, for which neither setuptools nor torch has a place."""

        def build_extension(self, ext):
            chosen = [source for source in ext.sources if source in DEPENDENT]
            if chosen:
                common = [flag for flag in ext.extra_compile_args["nvcc"] if not flag.startswith("-gencode")]
                nvcc = common + gencode(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), 90)
                ext.extra_objects += self.compiler.compile(
                    chosen,
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs={**ext.extra_compile_args, "nvcc": nvcc},
                )
                ext.sources = [source for source in ext.sources if source not in DEPENDENT]
            super().build_extension(ext)

    host = ["-g0", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=."]

    def extension(name, sources, libraries, cxx, **kwargs):
        return Extension(
            f"tokred_kernels.{name}",
            sorted(sources),
            include_dirs=cpp_extension.include_paths("cuda" if name == "_cuda" else "cpu"),
            library_dirs=cpp_extension.library_paths("cuda" if name == "_cuda" else "cpu"),
            libraries=libraries,
            extra_compile_args={
                "cxx": [*cxx, "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", *host],
                "nvcc": ["-std=c++17", "--compress-mode=size", "--expt-relaxed-constexpr", "--threads=2"]
                + gencode(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
                + [f"-Xcompiler={flag}" for flag in ["-Os", *host]],
            },
            extra_link_args=["-Wl,-s"],
            py_limited_api=True,
            language="c++",
            **kwargs,
        )

    # Not -O3: a third more to compile, for nothing. The loops over a tile say themselves that they are to be unrolled.
    cxx = ["-O2", "-funswitch-loops"]
    built = [extension("_C", ["csrc/ops.cpp", *glob.glob("csrc/cpu/*.cpp")], ["torch", "torch_cpu"], cxx)]
    if not reason:
        sources = glob.glob("csrc/cuda/*.cu") + glob.glob("csrc/cuda/*.cpp")
        libraries = ["torch", "torch_cpu", "torch_cuda", "cudart"]  # torch has loaded its CUDA runtime
        built.append(extension("_cuda", sources, libraries, ["-Os", "-DUSE_CUDA"]))  # no kernel is C++
    return built, {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    version=VERSION,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
