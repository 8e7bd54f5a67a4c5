"""The machine code of every CUDA kernel, compiled for GPUs that are not here: spills, registers, instructions."""

import collections
import glob
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache/cuda_static"
ARCHS = ("sm_80", "sm_90", "sm_100")
REGISTERS = 65536  # of a multiprocessor
_ELEMENTS = {
    "f": "float",
    "6__half": "half",
    "13__nv_bfloat16": "bfloat16",
    "5uint4": "uint4",
    "j": "uint32",
    "t": "uint16",
}

# (file, kernel): threads, blocks a multiprocessor must hold by registers, instructions it must contain.
EXPECTED = {
    **{("match", f"match_kernel<{t},false>"): (256, 2, {"FFMA": 4 * t * t, "LDS.128": 2 * t}) for t in (4, 5, 6, 7)},
    **{("match", f"match_kernel<{t},true>"): (256, 2, {"FFMA": 8 * t * t, "LDS.128": 4 * t}) for t in (4, 5, 6, 7)},
    **{("match", f"edge_kernel<{t},{deep},{back}>"): (256, 2, {"FFMA": 4 * t * t, "LDS.128": 2 * t, "STG.E.64": t})
       for t, deep in ((5, "false"), (4, "true")) for back in ("false", "true")},
    ("match", "unit_kernel"): (256, 4, {"LDG.E.128": 4, "STG.E.128": 2}),
    ("match", "select_kernel"): (1024, 2, {"SHFL": 10, "VOTE": 1}),
    ("match", "follow_kernel"): (256, 8, {"LDG.E.64": 2, "STS.64": 1}),
    **{("merge", f"merge_kernel<{t},{16 // s}>"): (256, 4, {"LDG.E.128": 8, "STG.E.128": 5})
       for t, s in (("float", 4), ("half", 2), ("bfloat16", 2))},
    **{("merge", f"merge_kernel<{t},1>"): (256, 4, {"VOTE": 8}) for t in ("float", "half", "bfloat16")},
    ("unmerge", "unmerge_kernel<uint4>"): (256, 8, {"LDG.E.128": 4, "STG.E.128": 4}),
    ("unmerge", "unmerge_kernel<uint32>"): (256, 8, {"LDG.E": 8, "STG.E": 4}),
    ("unmerge", "unmerge_kernel<uint16>"): (256, 8, {"LDG.E.U16": 4, "STG.E.U16": 4}),
    ("topk", "topk_kernel"): (1024, 2, {"SHFL": 10, "VOTE": 2}),
    **{("topk_gather", f"topk_gather_kernel<{t},{16 // s}>"):
       (256, 4, {"LDG.E.128": 4, "STG.E.128": 4, "FFMA": 32 // s, "VOTE": 8})
       for t, s in (("float", 4), ("half", 2), ("bfloat16", 2))},
    **{("topk_gather", f"topk_gather_kernel<{t},1>"): (256, 4, {"VOTE": 8}) for t in ("float", "half", "bfloat16")},
    **{(op, f"{op}_kernel<{t},{16 // s}>"): (256, 3, {"LDG.E.128": 4, "STG.E.128": 2, "LDS.128": 2, "MUFU": 2})
       for op in ("add_merge_norm", "add_topk_gather_norm") for t, s in (("float", 4), ("half", 2), ("bfloat16", 2))},
    **{(op, f"{op}_kernel<{t},1>"): (256, 3, {"VOTE": 8, "SHFL": 10})
       for op in ("add_merge_norm", "add_topk_gather_norm") for t in ("float", "half", "bfloat16")},
    # attention_kernel<*, width, key tiles, resident, mean>: a tensor core product is 16 rows, 8 columns and 16 deep.
    **{("attention", f"attention_kernel<{t},{w},{n},{r},{m}>"): (128, b, {"HMMA": n * w // 4, "LDSM": n * w // 8})
       for t in ("half", "bfloat16")
       for w, n, r, m, b in ((64, 7, "true", "false", 4), (64, 7, "true", "true", 3), (64, 13, "true", "false", 3),
                             (64, 13, "true", "true", 2), (64, 16, "true", "false", 2), (32, 4, "false", "false", 4),
                             (64, 4, "false", "false", 4), (80, 4, "false", "false", 3), (96, 4, "false", "false", 3),
                             (128, 4, "false", "false", 2))},
    **{("attention", f"attention_kernel<float,{w},2,false,false>"): (128, b, {"FFMA": 2 * 8 * w, "LDS.128": 12})
       for w, b in ((32, 4), (64, 3), (80, 3), (96, 3), (128, 2))},
    **{("attention", f"column_kernel<{t},{w}>"): (128, 4, {"HMMA": w // 2, "LDSM": w // 4 + w // 16})
       for t in ("half", "bfloat16") for w in (32, 64, 80, 96, 128)},
    **{("attention", f"column_kernel<float,{w}>"): (128, 4, {"FFMA": 128, "LDS.128": 12})
       for w in (32, 64, 80, 96, 128)},
    **{("attention", f"cls_kernel<{t}>"): (256, 2, {"FFMA": 64, "LDG.E.128": 8})
       for t in ("float", "half", "bfloat16")},
    ("attention", "head_mean_kernel"): (256, 8, {"STG": 1}),
}  # fmt: skip


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


@pytest.fixture(scope="module")
def kernels():
    """{(file, kernel, arch): {"REG": ..., "STACK": ..., "SHARED": ..., "code": Counter of instructions}}."""
    tools = _tools()
    if missing := [tool for tool, path in tools.items() if path is None]:
        pytest.skip(f"needs {', '.join(missing)} (CUDA toolkit; cuobjdump and nvdisasm also come with Triton)")
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA headers")
    found = {}
    for name in sorted({file for file, _ in EXPECTED}):
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
        codes = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHS]
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


def _readable(mangled: str) -> str:
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
        facts[_readable(mangled)].update({k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)})
    for mangled, body in re.findall(r"Function : (\w+)\n(.*?)\n\s*\.{10}", text, re.DOTALL):
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body, re.MULTILINE)
        facts[_readable(mangled)]["code"] = collections.Counter(code)
    return facts


def count(code: collections.Counter, instruction: str) -> int:
    """Instructions of that name (a pattern), with any further suffix: LDS.128 is an LDS."""
    return sum(n for name, n in code.items() if re.match(rf"(?:{instruction})(\.|$)", name))


def test_no_kernel_is_missing_or_unknown(kernels):
    assert set(kernels) == {(*key, arch) for key in EXPECTED for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("file, kernel", EXPECTED, ids=lambda x: x)
def test_machine_code(kernels, file, kernel, arch):
    facts = kernels[file, kernel, arch]
    threads, blocks, expected = EXPECTED[file, kernel]
    code = facts["code"]
    assert facts["STACK"] == 0
    assert count(code, "LDL") == count(code, "STL") == 0, "spills"
    assert count(code, "LD") == count(code, "ST") == 0, "generic accesses: shared memory was not recognised"
    assert -(-facts["REG"] // 8) * 8 * threads * blocks <= REGISTERS
    for instruction, least in expected.items():
        assert count(code, instruction) >= least, f"{instruction}: {count(code, instruction)}"


def test_atomics_are_nowhere(kernels):
    for code in (facts["code"] for facts in kernels.values()):
        assert not [name for name in code if re.match(r"(RED|REDG|ATOM|ATOMG|ATOMS)(\.|$)", name)]
