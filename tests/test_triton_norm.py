"""The Triton kernels of add_merge_norm and add_topk_gather_norm: in the interpreter, and compiled for four GPUs."""

import pytest
import torch
from cases import MERGE_CASES, MergeCase
from norm_oracle import EPS, affine, branch_of, check_norm, check_rows, scaled
from oracle import check_merge, same
from topk_cases import FUSE, TOPK_CASES, TopkCase
from topk_oracle import check_gather
from triton_aot import SHARED_LIMIT, TARGETS, compile_for, launches, resources
from triton_interpreter import interpreter

from tokred_kernels import reference
from tokred_kernels.triton._norm import WIDEST

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def triton():
    with interpreter() as call:
        yield call


# The interpreter takes a millisecond for a program. Which token goes where is merge's and topk's: every size and trap
# once.
MERGED = [c for c in MERGE_CASES if c.small and c.weight == "none" and c.M < 400 and c.dtype != torch.float16]
GATHERED = [
    c for c in TOPK_CASES if c.small and c.trap != "odd-values" and (c.seed or c.C != 24 or c.layout == "inner")
]


@pytest.mark.parametrize("case", MERGED, ids=lambda c: c.id)
def test_add_merge_norm(case, triton):
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    branch, norm = branch_of(x), affine(case.C, torch.float32, case.dtype)
    out, size_out, normed = triton("add_merge_norm", x, branch, assign, case.M, *norm, size, eps=EPS)
    check_merge((out, size_out), x + branch, assign, case.M, size)
    check_norm(normed, out, *norm)


@pytest.mark.parametrize("case", GATHERED, ids=lambda c: c.id)
def test_add_topk_gather_norm(case, triton):
    x, score = case.x(), case.score()
    branch, norm = branch_of(x), affine(case.C, case.dtype, torch.float32)
    for fuse in ("mean", "sum") if case.trap in ("mixed", "nan") else ("mean",):
        out, assign, normed = triton(
            "add_topk_gather_norm", x, branch, score, case.k, *norm, case.p, fuse=fuse, eps=EPS
        )
        check_gather((out, assign), x + branch, score, case.k, case.p, fuse)
        check_norm(normed, out, *norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", ["both", "scale", "bias"])
def test_a_branch_with_scale_and_bias(given, dtype, triton):
    case = MergeCase(C=33, dtype=dtype, size="count")
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    branch, norm, (scale, bias) = branch_of(x), affine(case.C), scaled(case.C, torch.float32, dtype)
    scale, bias = None if given == "bias" else scale, None if given == "scale" else bias
    out, _, normed = triton("add_merge_norm", x, branch, assign, case.M, *norm, size, scale, bias, eps=EPS)
    check_rows(out, lambda y: reference.merge(y, assign, case.M, size)[0], x, branch, scale, bias)
    check_norm(normed, out, *norm)
    score = size.softmax(1)
    for fuse in FUSE:
        out, _, normed = triton("add_topk_gather_norm", x, branch, score, 9, *norm, 1, scale, bias, fuse=fuse, eps=EPS)
        check_rows(out, lambda y, fuse=fuse: reference.topk_gather(y, score, 9, fuse=fuse)[0], x, branch, scale, bias)
        check_norm(normed, out, *norm)


def test_rows_too_wide_for_registers_and_without_weights(triton):
    case = MergeCase(B=1, N=5, M=3, C=WIDEST + 1, size="count")
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    out, size_out, normed = triton("add_merge_norm", x, x, assign, case.M, None, None, size)
    check_merge((out, size_out), x + x, assign, case.M, size)
    check_norm(normed, out, None, None, 1e-6)
    out, assign, normed = triton("add_topk_gather_norm", x, x, size, 2, None, None, fuse="sum")
    check_gather((out, assign), x + x, size, 2, 1, "sum")
    check_norm(normed, out, None, None, 1e-6)
    scale, bias = scaled(case.C)
    out, _, _ = triton("add_merge_norm", x, x, assign, 1, None, None, size, scale, bias)
    check_rows(out, lambda y: reference.merge(y, assign, 1, size)[0], x, x, scale, bias)


def test_the_kernels_are_what_runs(triton):
    case = TopkCase(B=1, N=9, C=3, k=4)
    x, norm = case.x(), affine(3)
    triton("add_topk_gather_norm", x, x, case.score(), case.k, *norm, fuse="sum")
    assert list(triton.launched) == ["topk_kernel", "gather_norm_kernel"]
    triton("add_merge_norm", x, x, torch.zeros(1, 9, dtype=torch.int32), 4, *norm)
    assert list(triton.launched) == ["merge_kernel"]


def test_one_image_alone_equals_the_batch(triton):
    case = TopkCase(B=2, trap="ties", dtype=torch.bfloat16)
    x, score, norm = case.x(), case.score(), affine(case.C)
    assign, size = MergeCase(N=case.N).assign(), score + 1
    gathered = triton("add_topk_gather_norm", x, x, score, case.k, *norm, fuse="mean")
    merged = triton("add_merge_norm", x, x, assign, 11, *norm, size)
    for b in range(case.B):
        x1, score1, assign1, size1 = (t[b : b + 1] for t in (x, score, assign, size))
        alone = triton("add_topk_gather_norm", x1, x1, score1, case.k, *norm, fuse="mean")
        assert all(same(one, whole[b : b + 1]) for one, whole in zip(alone, gathered, strict=True))
        alone = triton("add_merge_norm", x1, x1, assign1, 11, *norm, size1)
        assert all(same(one, whole[b : b + 1]) for one, whole in zip(alone, merged, strict=True))


def test_float64_is_refused(triton):
    x = torch.zeros(1, 4, 2, dtype=torch.float64)
    expected = "x must be float32, float16 or bfloat16 on a CUDA device, got float64"
    with pytest.raises(RuntimeError, match=f"^add_merge_norm: {expected}"):
        triton("add_merge_norm", x, x, torch.zeros(1, 4, dtype=torch.int32), 2, None, None)
    with pytest.raises(RuntimeError, match=f"^add_topk_gather_norm: {expected}"):
        triton("add_topk_gather_norm", x, x, torch.zeros(1, 4), 2, None, None)


# Of half precision and of float32: the most tokens that are scanned, the widest row of a list.
WIDE = [(dtype, N, C) for dtype in (torch.bfloat16, torch.float32) for N, C in ((1024, 1024), (1025, WIDEST))]


def _variants() -> list:
    found = {}
    for dtype, N, C in (*((dtype, 197, 384) for dtype in DTYPES), *WIDE):
        x, norm = torch.zeros(2, N, C, dtype=dtype), affine(C, dtype, dtype)
        assign, size = torch.zeros(2, N, dtype=torch.int32), torch.ones(2, N)
        found.update(dict.fromkeys(launches("add_merge_norm", x, x, assign, N - 13, *norm, size)))
        found.update(dict.fromkeys(launches("add_topk_gather_norm", x, x, size, N // 2, *norm, fuse="mean")))
        if N == 197:
            found.update(dict.fromkeys(launches("add_merge_norm", x, x, assign, N - 13, *norm, size, *norm)))
            found.update(dict.fromkeys(launches("add_topk_gather_norm", x, x, size, 99, *norm, 1, *norm, fuse="mean")))
    return [launch for launch in found if launch.name in ("merge_kernel", "gather_norm_kernel")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", _variants(), ids=lambda launch: launch.id)
def test_resources(launch, target):
    got = resources(compile_for(launch, target), target)
    assert got.spills == 0
    assert got.shared <= SHARED_LIMIT[target]
    # A kernel can come out empty without an error.
    assert got.loads >= 4
    assert got.stores >= 2
