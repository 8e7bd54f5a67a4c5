"""Every Triton kernel on the CPU, in the repaired interpreter, over the table of cases against the oracle.

Uninitialised memory is NaN or the largest integer there, and every call checks that its inputs are unchanged. Layouts,
races and the tensor cores' rounding are invisible to an interpreter: test_gpu_triton.py and test_triton_aot.py see them.
"""

import pytest
import torch
from cases import MATCH_CASES, MERGE_CASES
from oracle import check_assign, check_merge
from triton_interpreter import interpreter

MATCH_KERNELS = ["unit_kernel", "edges_kernel", "assign_kernel"]


@pytest.fixture(scope="module")
def triton():
    with interpreter() as call:
        yield call


def by_id(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equal."""
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@by_id(MATCH_CASES)
def test_match(case, triton):
    metric, weight = case.metric(), case.weight()
    assign = triton("match", metric, case.r, case.p, weight, power=case.power)
    check_assign(assign, metric, case.r, case.p, weight, case.power)


@by_id([c for c in MATCH_CASES if c.small])
def test_match_merge(case, triton):
    x, metric, size = case.x(), case.metric(), case.size()
    out, size_out, assign = triton("match_merge", x, metric, case.r, case.p, size)
    check_assign(assign, metric, case.r, case.p)
    M = case.N - max(0, min(case.r, (case.N - case.p) // 2))
    check_merge((out, size_out), x, assign, M, size)
    assert same(out[:, : case.p], x[:, : case.p])


@pytest.mark.parametrize("reduce", ["mean", "sum", "amax"])
@by_id(MERGE_CASES)
def test_merge(case, reduce, triton):
    x, assign, size, weight = case.x(), case.assign(), case.per_token("size"), case.per_token("weight")
    got = triton("merge", x, assign, case.M, size, weight, reduce=reduce)
    check_merge(got, x, assign, case.M, size, weight, reduce)


@by_id(MERGE_CASES)
def test_unmerge(case, triton):
    y, assign = case.y(), case.assign()
    x = triton("unmerge", y, assign)
    rows = assign.long()
    kept = (rows >= 0) & (rows < case.M)
    want = torch.zeros(case.B, case.N, case.C, dtype=y.dtype)
    for b in range(case.B):
        want[b, kept[b]] = y[b, rows[b, kept[b]]]
    assert same(x, want)
