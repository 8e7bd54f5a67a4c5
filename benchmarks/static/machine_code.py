"""The machine code of the CUDA C++ kernels, compiled for GPUs that are not here."""

import collections
import fcntl
import glob
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/cuda_static"
ARCHS = ("sm_80", "sm_90", "sm_100")
_ELEMENTS = {
    "f": "float",
    "6__half": "half",
    "13__nv_bfloat16": "bfloat16",
    "5uint4": "uint4",
    "j": "uint32",
    "t": "uint16",
}


def _find(tool: str, *places: str) -> str | None:
    found = [p for place in places for p in sorted(glob.glob(f"{place}/{tool}"), reverse=True)]
    return found[0] if found else shutil.which(tool)


def _tools() -> dict[str, str | None]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [f"{home}/bin", "/usr/local/cuda*/bin"]
    try:
        import triton.backends.nvidia as nvidia

        places.append(str(Path(nvidia.__file__).parent / "bin"))
    except ImportError:
        pass
    return {tool: _find(tool, *places) for tool in ("nvcc", "cuobjdump", "nvdisasm")}


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if absent := [tool for tool, path in _tools().items() if path is None]:
        return f"needs {', '.join(absent)} (CUDA toolkit; cuobjdump and nvdisasm also come with Triton)"
    return "this torch has no CUDA headers" if torch.version.cuda is None else None


def compiler() -> str:
    """nvcc and its release."""
    text = subprocess.run([_tools()["nvcc"], "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', text)[1]}"


def kernels(files: list[str]) -> dict[tuple[str, str, str], dict]:
    """{(file, kernel, arch): {"REG": ..., "STACK": ..., "SHARED": ..., "code": Counter of instructions}}."""
    tools, found = _tools(), {}
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:  # parallel test processes compile once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in files:
            for arch, text in _disassembled(name, tools).items():
                for kernel, facts in _parse(text).items():
                    found[name, kernel, arch] = facts
    return found


def _disassembled(name: str, tools: dict[str, str]) -> dict[str, str]:
    """{arch: resource usage and machine code}, cached by the hash of all sources."""
    sources = sorted([*(ROOT / "csrc/cuda").iterdir(), *(ROOT / "csrc").glob("check*.h")])
    key = b"".join(p.read_bytes() for p in sources) + f"{tools['nvcc']} {torch.__version__}".encode()
    folder = CACHE / hashlib.sha256(key).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    texts = {arch: folder / f"{name}.{arch}.sass" for arch in ARCHS}
    if not all(p.exists() for p in texts.values()):
        binary = folder / f"{name}.fatbin"
        codes = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,sm_100]"]  # as setup.py
        flags = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-t2"]
        includes = [f"-I{p}" for p in cpp_extension.include_paths()]
        source = ROOT / f"csrc/cuda/{name}.cu"
        subprocess.run([tools["nvcc"], "-fatbin", source, "-o", binary, *flags, *includes, *codes], check=True)
        path = {**os.environ, "PATH": f"{Path(tools['nvdisasm']).parent}:{os.environ['PATH']}"}
        for arch, text in texts.items():
            command = [tools["cuobjdump"], "-res-usage", "-sass", "-arch", arch, binary]
            text.write_text(subprocess.run(command, check=True, capture_output=True, text=True, env=path).stdout)
        binary.unlink()
    return {arch: p.read_text() for arch, p in texts.items()}


def readable(mangled: str) -> str:
    """merge_kernel<bfloat16,8> of _ZN6tokred12merge_kernelI13__nv_bfloat16Li8EE..."""
    kernel, rest = re.match(r"_ZN6tokred\d+([a-z_]+_kernel)(.*)", mangled).groups()
    if not rest.startswith("I"):
        return kernel
    arguments = re.match(r"I(\d+__\w+?(?=L|E)|\d*[a-z]\w*?(?=L|E))?((?:L[ib]\w+?E)*)E", rest)
    values = [_ELEMENTS[arguments[1]]] if arguments[1] else []
    values += [str(bool(int(v))).lower() if t == "b" else v for t, v in re.findall(r"L([ib])(\d+)E", arguments[2])]
    return f"{kernel}<{','.join(values)}>"


def _parse(text: str) -> dict[str, dict]:
    facts = collections.defaultdict(dict)
    for mangled, usage in re.findall(r"Function (\w+):\n\s*(REG:.*)", text):
        facts[readable(mangled)].update({k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)})
    for mangled, body in re.findall(r"Function : (\w+)\n(.*?)\n\s*\.{10}", text, re.DOTALL):
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body, re.MULTILINE)
        facts[readable(mangled)]["code"] = collections.Counter(code)
    return facts


def count(code: collections.Counter, instruction: str) -> int:
    """Instructions of that name (a pattern), with any further suffix: LDS.128 is an LDS."""
    return sum(n for name, n in code.items() if re.match(rf"(?:{instruction})(\.|$)", name))
