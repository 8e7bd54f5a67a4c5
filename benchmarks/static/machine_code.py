"""The machine code of the CUDA C++ kernels for GPUs that are not here: that of the wheel."""

import collections
import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import torch

from benchmarks import wheel
from benchmarks.wheel import toolkit

ARCHS = ("sm_80", "sm_90", "sm_100")
_ELEMENTS = {
    "f": "float",
    "6__half": "half",
    "13__nv_bfloat16": "bfloat16",
    "5uint4": "uint4",
    "j": "uint32",
    "t": "uint16",
}


def _tools() -> dict[str, str | None]:
    places = [f"{toolkit.cuda_home()}/bin", "/usr/local/cuda*/bin"]
    try:
        import triton.backends.nvidia as nvidia

        places.append(str(Path(nvidia.__file__).parent / "bin"))
    except ImportError:
        pass

    def find(tool: str) -> str | None:
        found = [p for place in places for p in sorted(glob.glob(f"{place}/{tool}"), reverse=True)]
        return found[0] if found else shutil.which(tool)

    return {tool: find(tool) for tool in ("cuobjdump", "nvdisasm")}


def missing() -> str | None:
    """Why nothing can be compiled or read here, or None."""
    if reason := toolkit.why_no_cuda(torch, toolkit.cuda_home()):
        return reason
    if absent := [tool for tool, path in _tools().items() if path is None]:
        return f"needs {' and '.join(absent)}, which come with the CUDA toolkit and with Triton"
    return None


def compiler() -> str:
    """nvcc and its release."""
    return f"nvcc {toolkit.nvcc_version(toolkit.cuda_home())}"


def kernels() -> dict[tuple[str, str], dict]:
    """{(kernel, arch): {"REG": ..., "STACK": ..., "SHARED": ..., "code": Counter of instructions}}, and "early": a list
    of those before the wait of a dependent launch, where there is one."""
    built = wheel.built()
    read = built.with_name("machine_code.json")
    if not read.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            with zipfile.ZipFile(built) as archive:
                library = archive.extract("tokred_kernels/_cuda.abi3.so", folder)
            facts = {arch: _parse(_disassembled(library, arch)) for arch in ARCHS}
            (Path(folder) / "facts").write_text(json.dumps(facts))
            (Path(folder) / "facts").rename(read)  # another process may be reading it too
    found = {}
    for arch, of_arch in json.loads(read.read_text()).items():
        for kernel, facts in of_arch.items():
            found[kernel, arch] = {**facts, "code": collections.Counter(facts["code"])}
    return found


def _disassembled(library: str, arch: str) -> str:
    """Resource usage and machine code."""
    tools = _tools()
    path = {**os.environ, "PATH": f"{Path(tools['nvdisasm']).parent}:{os.environ['PATH']}"}
    command = [tools["cuobjdump"], "-res-usage", "-sass", "-arch", arch, library]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=path).stdout


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
        if "ACQBULK" in code:
            facts[readable(mangled)]["early"] = code[: code.index("ACQBULK")]
    return facts


def count(code: collections.Counter, instruction: str) -> int:
    """Instructions of that name (a pattern), with any further suffix: LDS.128 is an LDS."""
    return sum(n for name, n in code.items() if re.match(rf"(?:{instruction})(\.|$)", name))
