"""The Triton attention kernels in the variants the launchers launch, compiled for four GPUs, as in test_triton_aot.py.

Compilations are kept in .cache/triton, by source: the first run takes minutes, the next ones seconds.
"""

from unittest import mock

import pytest
import torch
from triton_aot import SHARED_LIMIT, TARGETS, compile_for, launches, resources

from tokred_kernels.triton import attention

BF16, FLOAT32 = torch.bfloat16, torch.float32


def qkv(N: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """[2, 6, N, D], views of a fused qkv projection."""
    return torch.zeros(2, N, 3, 6, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)


def _variants(rows: int) -> dict:
    """Every kernel and mode; `rows` as _query_rows gives them for the GPU."""
    found = {}

    def launched(op, *args, **kwargs):
        found.update(dict.fromkeys(launches(op, *args, **kwargs)))

    size, many = torch.ones(2, 197), torch.ones(2, 577)
    with mock.patch.object(attention, "_query_rows", return_value=rows):
        launched("attention", *qkv(197, 64, BF16))
        for N, scores in ((197, "none"), (197, "mean"), (180, "none"), (93, "mean")):
            launched("attention", *qkv(N, 64, BF16), size[:, :N], scores=scores)
        launched("attention_scores", *qkv(197, 64, BF16)[:2], size)
    for dtype, D, scores in (
        (BF16, 64, "mean"),
        (BF16, 32, "none"),
        (BF16, 72, "none"),
        (FLOAT32, 64, "none"),
        (FLOAT32, 128, "mean"),
    ):
        launched("attention", *qkv(577, D, dtype), many, scores=scores)
    for dtype, D, scores in ((torch.float16, 64, "cls"), (BF16, 72, "mean"), (FLOAT32, 128, "none")):
        q, k, v = qkv(577, D, dtype)
        grad_scores = None if scores == "none" else many
        launched("attention_backward", q, grad_scores, q, k, v, q, grad_scores, scores=scores)
    return found


VARIANTS = {
    "sm80": _variants(64),
    "sm90": _variants(64),
    "sm100": _variants(32),
    "gfx942": _variants(64),
}


@pytest.mark.parametrize(
    "launch,target",
    [pytest.param(launch, target, id=f"{target}-{launch.id}") for target in TARGETS for launch in VARIANTS[target]],
)
def test_resources(launch, target):
    got = resources(compile_for(launch, target), target)
    assert got.spills == 0
    assert got.shared <= SHARED_LIMIT[target]
    # A kernel can come out empty without an error.
    assert got.loads >= 1
    assert got.stores >= 1
    assert (got.products >= 2) == (launch.name != "scores_kernel")
