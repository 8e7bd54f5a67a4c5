"""The machine code of every CUDA kernel of the wheel, for GPUs that are not here: spills, registers, instructions."""

import re

import pytest

from benchmarks.static import machine_code
from benchmarks.static.machine_code import ARCHS, count

REGISTERS = 65536  # of a multiprocessor

# kernel: threads, blocks a multiprocessor must hold by registers, instructions it must contain.
EXPECTED = {
    **{f"match_kernel<{t}>": (256, 2, {"FFMA": 4 * t * t, "LDS.128": 2 * t}) for t in (4, 5, 6, 7)},
    **{f"edge_kernel<{t},{deep}>": (256, 2, {"FFMA": 4 * t * t, "LDS.128": 2 * t, "STG.E.64": t})
       for t, deep in ((5, "false"), (4, "true"))},
    "select_kernel": (1024, 2, {"SHFL": 10, "VOTE": 1}),
    "follow_kernel": (256, 8, {"LDG.E.64": 2, "STS.64": 1}),
    **{f"merge_kernel<{t},{16 // s}>": (256, 4, {"LDG.E.128": 8, "STG.E.128": 5})
       for t, s in (("float", 4), ("half", 2), ("bfloat16", 2))},
    **{f"merge_kernel<{t},1>": (256, 4, {"VOTE": 8}) for t in ("float", "half", "bfloat16")},
    "unmerge_kernel<uint4>": (256, 8, {"LDG.E.128": 4, "STG.E.128": 4}),
    "unmerge_kernel<uint32>": (256, 8, {"LDG.E": 8, "STG.E": 4}),
    "unmerge_kernel<uint16>": (256, 8, {"LDG.E.U16": 4, "STG.E.U16": 4}),
    "topk_kernel": (1024, 2, {"SHFL": 10, "VOTE": 2}),
    **{f"topk_gather_kernel<{t},{16 // s}>":
       (256, 4, {"LDG.E.128": 4, "STG.E.128": 4, "FFMA": 32 // s, "VOTE": 8})
       for t, s in (("float", 4), ("half", 2), ("bfloat16", 2))},
    **{f"topk_gather_kernel<{t},1>": (256, 4, {"VOTE": 8}) for t in ("float", "half", "bfloat16")},
    **{f"{op}_kernel<{t},{16 // s}>": (256, b, {"LDG.E.128": 4, "STG.E.128": 2, "LDS.128": 2, "MUFU": 2})
       for op, b in (("add_merge_norm", 3), ("add_topk_gather_norm", 4))
       for t, s in (("float", 4), ("half", 2), ("bfloat16", 2))},
    **{f"{op}_kernel<{t},1>": (256, 3, {"VOTE": 8, "SHFL": 10})
       for op in ("add_merge_norm", "add_topk_gather_norm") for t in ("float", "half", "bfloat16")},
    # attention_kernel<*, width, key tiles, resident, mean>: a tensor core product is 16 rows, 8 columns and 16 deep.
    **{f"attention_kernel<{t},64,{n},true,{m}>": (128, b, {"HMMA": n * 16, "LDSM": n * 8})
       for t in ("half", "bfloat16")
       for n, m, b in ((7, "false", 4), (7, "true", 3), (13, "false", 3), (13, "true", 2), (16, "false", 2))},
    # Streamed: the logits of one tile more, for the column sums.
    **{f"attention_kernel<{t},{w},4,false,false>": (h, b, {"HMMA": w + w // 8, "LDSM": w // 2 + w // 8})
       for t in ("half", "bfloat16")
       for w, h, b in ((32, 256, 2), (64, 256, 2), (80, 128, 3), (96, 128, 3), (128, 128, 2))},
    # Three products of TF32, 8 deep, for one; those of the logits two steps at a time.
    **{f"attention_kernel<float,{w},2,false,false>": (128, b, {"HMMA": 3 * w // 2 + 36, "LDSM": 12})
       for w, b in ((32, 4), (64, 4), (80, 3), (96, 3), (128, 2))},
    **{f"cls_kernel<{t}>": (256, 2, {"FFMA": 64, "LDG.E.128": 8})
       for t in ("float", "half", "bfloat16")},
    "head_mean_kernel": (256, 5, {"LDG": 16, "STG": 1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    """As machine_code.kernels has them."""
    if reason := machine_code.missing():
        pytest.skip(reason)
    return machine_code.kernels()


def test_no_kernel_is_missing_or_unknown(kernels):
    assert set(kernels) == {(kernel, arch) for kernel in EXPECTED for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", EXPECTED)
def test_machine_code(kernels, kernel, arch):
    facts = kernels[kernel, arch]
    threads, blocks, expected = EXPECTED[kernel]
    code = facts["code"]
    assert facts["STACK"] == 0
    assert count(code, "LDL") == count(code, "STL") == 0, "spills"
    assert count(code, "LD") == count(code, "ST") == 0, "generic accesses: shared memory was not recognised"
    assert -(-facts["REG"] // 8) * 8 * threads * blocks <= REGISTERS
    for instruction, least in expected.items():
        assert count(code, instruction) >= least, f"{instruction}: {count(code, instruction)}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", EXPECTED)
def test_dependent_launch(kernels, kernel, arch):
    """From 9.0 on a kernel that begins early does nothing with memory, and does not end, before its one wait."""
    facts = kernels[kernel, arch]
    code, newer = facts["code"], arch != "sm_80"
    waits = newer and bool(re.match(r"(edge|select|follow|merge|topk_gather)_kernel", kernel))
    lets_next_begin = newer and bool(re.match(r"(match|edge|select|topk)_kernel", kernel))
    assert (count(code, "ACQBULK"), count(code, "PREEXIT")) == (waits, lets_next_begin)
    assert waits == ("early" in facts)
    assert not [name for name in facts.get("early", ()) if re.match(r"(U?LD(?!C)|ST|RED|ATOM|BAR|BRA|EXIT|RET)", name)]


def test_atomics_are_nowhere(kernels):
    for code in (facts["code"] for facts in kernels.values()):
        assert not [name for name in code if re.match(r"(RED|REDG|ATOM|ATOMG|ATOMS)(\.|$)", name)]
