"""The CUDA kernels of add_merge_norm and add_topk_gather_norm on the host, by the emulator, over the shared cases."""

import functools

import pytest
import torch
from cases import MERGE_CASES, MergeCase
from norm_oracle import EPS, affine, branch_of, check_norm, check_rows, scaled
from oracle import check_merge, same
from simt import ops
from topk_cases import FUSE, TOPK_CASES, TopkCase
from topk_oracle import check_gather

from tokred_kernels import reference

SEEDS = (0, 1, 2)  # 0: threads in order
MERGED = [c for c in MERGE_CASES if c.weight == "none"]
GATHERED = [c for c in TOPK_CASES if c.trap != "odd-values"]  # the bits of a NaN do not survive an addition


def merged(case: MergeCase, dtype: torch.dtype = torch.float32, **kwargs):
    x, norm = case.x(), affine(case.C, torch.float32, dtype)
    return ops.add_merge_norm(x, branch_of(x), case.assign(), case.M, *norm, case.per_token("size"), eps=EPS, **kwargs)


def gathered(case: TopkCase, fuse: str, dtype: torch.dtype = torch.float32, **kwargs):
    x, norm = case.x(), affine(case.C, torch.float32, dtype)
    return ops.add_topk_gather_norm(x, branch_of(x), case.score(), case.k, *norm, case.p, fuse=fuse, eps=EPS, **kwargs)


@pytest.mark.parametrize("case", MERGED, ids=lambda c: c.id)
def test_add_merge_norm(case):
    x = case.x()
    out, size_out, normed = merged(case, case.dtype)
    check_merge((out, size_out), x + branch_of(x), case.assign(), case.M, case.per_token("size"))
    check_norm(normed, out, *affine(case.C, torch.float32, case.dtype))


@pytest.mark.parametrize("case", GATHERED, ids=lambda c: c.id)
def test_add_topk_gather_norm(case):
    """The dtypes share the code of the selection, so one mode does for each."""
    x = case.x()
    for fuse in FUSE if case.trap == "mixed" else ("mean",):
        out, assign, normed = gathered(case, fuse, case.dtype)
        check_gather((out, assign), x + branch_of(x), case.score(), case.k, case.p, fuse)
        check_norm(normed, out, *affine(case.C, torch.float32, case.dtype))


@pytest.mark.parametrize("C", [24, 23])
@pytest.mark.parametrize(
    "types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)], ids=str
)
def test_a_branch_with_scale_and_bias(C, types):
    of_rows, dtype = types
    case = MergeCase(C=C, dtype=dtype, size="count")
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    branch, norm, score = branch_of(x), affine(C, of_rows, of_rows), size.softmax(1)
    for scale, bias in ((*scaled(C, of_rows, of_rows),), (scaled(C, of_rows)[0], None), (None, scaled(C, of_rows)[0])):
        out, _, normed = ops.add_merge_norm(x, branch, assign, case.M, *norm, size, scale, bias, eps=EPS)
        check_rows(out, lambda y: reference.merge(y, assign, case.M, size)[0], x, branch, scale, bias)
        check_norm(normed, out, *norm)
        for fuse in FUSE:
            out, _, normed = ops.add_topk_gather_norm(x, branch, score, 9, *norm, 1, scale, bias, fuse=fuse, eps=EPS)
            kept = functools.partial(reference.topk_gather, score=score, k=9, fuse=fuse)
            check_rows(out, lambda y, kept=kept: kept(y)[0], x, branch, scale, bias)
            check_norm(normed, out, *norm)


@pytest.mark.parametrize("C", [24, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_the_type_of_x_or_none(C, dtype):
    case = MergeCase(C=C, dtype=dtype, size="count")
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    for norm in ((None, None), affine(C, dtype, dtype), (None, affine(C)[1]), (affine(C, dtype, dtype)[0], None)):
        out, _, normed = ops.add_merge_norm(x, branch_of(x), assign, case.M, *norm, size, eps=EPS)
        check_norm(normed, out, *norm)
        out, _, normed = ops.add_topk_gather_norm(x, branch_of(x), size, 9, *norm, fuse="sum", eps=EPS)
        check_norm(normed, out, *norm)


def test_rows_that_do_not_fit_shared_memory():
    case = MergeCase(B=1, N=4, M=2, C=26000, size="count")
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    out, size_out, normed = merged(case)
    check_merge((out, size_out), x + branch_of(x), assign, case.M, size)
    check_norm(normed, out, *affine(case.C))
    out, assign, normed = gathered(TopkCase(B=1, N=4, C=26000, k=1), "sum")
    check_norm(normed, out, *affine(case.C))


def test_the_schedule_does_not_matter():
    merge, topk = MergeCase(size="count", C=40), TopkCase(C=40)
    for first, *others in ([merged(merge, seed=s) for s in SEEDS], [gathered(topk, "mean", seed=s) for s in SEEDS]):
        assert all(same(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("members", [257, 321, 1000])
def test_more_members_than_the_list_holds(members):
    """The list is filled 256 tokens at a time and emptied in between; sums stay in index order."""
    case = MergeCase(B=1, N=members + 3, M=2, C=320, kind="one", size="count")
    out, size_out, normed = merged(case)
    x = case.x()
    check_merge((out, size_out), x + branch_of(x), case.assign(), 2, case.per_token("size"))
    check_norm(normed, out, *affine(case.C))
    case = TopkCase(B=1, N=members + 4, C=40, k=3, trap="zero")  # the plain mean: the list is made again
    x = case.x()
    *got, normed = gathered(case, "mean")
    check_gather(got, x + branch_of(x), case.score(), case.k, case.p, "mean")
    check_norm(normed, got[0], *affine(case.C))
