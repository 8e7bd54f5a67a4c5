"""Every Triton kernel, in the variants the launchers launch, compiled for four GPUs: nothing spills, everything fits.

Compilations are kept in .cache/triton, by source: the first run takes a minute, the next ones two seconds.
"""

import collections
import dataclasses

import pytest
import torch
from triton_aot import SHARED_LIMIT, TARGETS, compile_for, launches, resources

DTYPES = (torch.float32, torch.bfloat16)  # float16 compiles alike: benchmarks/static has it


def keys(N: int, H: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """[2, H, N, D], a view of a fused qkv projection."""
    return torch.zeros(2, N, 3, H, D, dtype=dtype)[:, :, 1].transpose(1, 2)


def _variants() -> list:
    found = {}

    def launched(op, *args, **kwargs):
        found.update(dict.fromkeys(launches(op, *args, **kwargs)))

    weight, assign = torch.ones(2, 197), torch.zeros(2, 197, dtype=torch.int32)
    for dtype in DTYPES:
        launched("match", keys(197, 6, 64, dtype), 13)
        launched("match", torch.zeros(2, 197, 768, dtype=dtype), 13)
        launched("match", keys(197, 6, 64, dtype), 13, two_way=True)
        launched("unmerge", torch.zeros(2, 184, 384, dtype=dtype), assign)
        for reduce in ("mean", "sum", "amax"):
            launched("merge", torch.zeros(2, 197, 384, dtype=dtype), assign, 184, weight, reduce=reduce)
    launched("match", torch.zeros(2, 197, 1281), 13)  # rows in two chunks, unaligned
    launched("match", torch.zeros(2, 577, 17), 13)
    launched("match", torch.zeros(2, 1027, 64), 13)  # ranks from their own kernel
    for D in (64, 384):
        for power in (1.0, 2.0):
            launched("match", torch.zeros(2, 197, D), 13, 1, weight, power=power)
            launched("match", torch.zeros(2, 197, D), 13, 1, weight, power=power, two_way=True)
    for N in (60, 577, 1024, 1025):  # assign scanned in each power of two, and listed
        x, assign, size = torch.zeros(2, N, 768), torch.zeros(2, N, dtype=torch.int32), torch.ones(2, N)
        launched("merge", x, assign, N - 13)
        launched("merge", x, assign, N - 13, size, size.clone())
        launched("merge", x.half(), assign, N - 13, size)
    launched("merge", torch.zeros(2, 1025, 33), torch.zeros(2, 1025, dtype=torch.int32), 9, reduce="amax")
    return list(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", _variants(), ids=lambda launch: launch.id)
def test_resources(launch, target):
    got = resources(compile_for(launch, target), target)
    assert got.spills == 0
    assert got.shared <= SHARED_LIMIT[target]
    # A kernel can come out empty without an error.
    assert got.loads >= 1
    assert got.stores >= 1
    # 6 products of 64 x BN x 64, on tensor cores: one instruction multiplies at most 64 x 256 x 16.
    assert (got.products >= 6 * 64 // 16) == (launch.name in ("edges_kernel", "back_kernel"))


def test_a_spill_is_seen():
    """The gate can fail: 128 x 128 scores and six operands fit no register file."""
    edges = next(v for v in launches("match", torch.zeros(2, 197, 384), 13) if v.name == "edges_kernel")
    wide = tuple((i, 128 if edges.signature[i][0] in ("BM", "BN") else value) for i, value in edges.constants)
    edges = dataclasses.replace(edges, constants=wide)
    assert resources(compile_for(edges, "sm80"), "sm80").spills > 0


def test_twelve_lengths_compile_few_variants():
    """A DeiT-S with r = 13: one launch configuration for each power of two, not one for each N."""
    variants = collections.defaultdict(set)
    N = 197
    for _ in range(12):
        for launch in launches(
            "match_merge", torch.zeros(2, N, 384), keys(N, 6, 64, torch.float32), 13, 1, torch.ones(2, N)
        ):
            variants[launch.name].add(launch)
        N -= 13
    assert {name: len(found) for name, found in variants.items()} == {
        "unit_kernel": 1,
        "edges_kernel": 1,
        "assign_kernel": 2,
        "merge_kernel": 3,
    }
