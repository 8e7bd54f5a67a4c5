"""add_merge_norm and add_topk_gather_norm on a device, by the CUDA C++ and by the Triton kernels, over shared cases."""

import pytest
import torch
from cases import MERGE_CASES, MergeCase
from norm_oracle import EPS, affine, branch_of, check_norm, check_rows, scaled
from oracle import check_merge, same
from topk_cases import FUSE, TOPK_CASES, TopkCase
from topk_oracle import check_gather

import tokred_kernels as tokred
from tokred_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

MERGED = MergeCase(B=16, N=197, M=184, C=384, kind="onto", size="count", dtype=torch.bfloat16)
GATHERED = TopkCase(B=16, N=197, C=384, k=138, dtype=torch.bfloat16)


@pytest.fixture(params=["cuda", "triton"], scope="module")
def kernels(request):
    try:
        selected = tokred.use_backend(request.param)
        selected.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    selected.__exit__(None, None, None)


def merged(case: MergeCase, rows: slice = slice(None)):
    x, size = case.x("cuda"), case.per_token("size", "cuda")
    norm = [t.cuda() for t in affine(case.C, torch.float32, case.dtype)]
    size = None if size is None else size[rows]
    return tokred.add_merge_norm(
        x[rows], branch_of(x.cpu()).cuda()[rows], case.assign("cuda")[rows], case.M, *norm, size, eps=EPS
    )


def gathered(case: TopkCase, fuse: str, rows: slice = slice(None)):
    x, score = case.x("cuda"), case.score("cuda")
    norm = [t.cuda() for t in affine(case.C, case.dtype, case.dtype)]
    return tokred.add_topk_gather_norm(
        x[rows], branch_of(x.cpu()).cuda()[rows], score[rows], case.k, *norm, case.p, fuse=fuse, eps=EPS
    )


@pytest.mark.parametrize("case", [c for c in MERGE_CASES if c.weight == "none"], ids=lambda c: c.id)
def test_add_merge_norm(case, poisoned):
    out, size_out, normed = merged(case)
    x = case.x()
    check_merge((out, size_out), x + branch_of(x), case.assign(), case.M, case.per_token("size"))
    check_norm(normed.cpu(), out.cpu(), *affine(case.C, torch.float32, case.dtype))


@pytest.mark.parametrize("fuse", FUSE)
@pytest.mark.parametrize("case", [c for c in TOPK_CASES if c.trap != "odd-values"], ids=lambda c: c.id)
def test_add_topk_gather_norm(case, fuse, poisoned):
    out, assign, normed = gathered(case, fuse)
    x = case.x()
    check_gather((out, assign), x + branch_of(x), case.score(), case.k, case.p, fuse)
    check_norm(normed.cpu(), out.cpu(), *affine(case.C, case.dtype, case.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_branch_with_scale_and_bias(dtype, poisoned):
    case = MergeCase(N=197, M=184, C=384, kind="onto", size="count", dtype=dtype)
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    branch, norm, score = branch_of(x), affine(case.C, dtype, dtype), size.softmax(1)
    for scale, bias in ((*scaled(case.C, dtype, dtype),), (scaled(case.C, torch.float32)[0], None)):
        rows = [None if t is None else t.cuda() for t in (scale, bias)]
        there = [t.cuda() for t in (x, branch)]
        on_gpu = [t.cuda() for t in norm]
        out, _, normed = tokred.add_merge_norm(*there, assign.cuda(), case.M, *on_gpu, size.cuda(), *rows, eps=EPS)
        check_rows(out.cpu(), lambda y: reference.merge(y, assign, case.M, size)[0], x, branch, scale, bias)
        check_norm(normed.cpu(), out.cpu(), *norm)
        out, _, normed = tokred.add_topk_gather_norm(*there, score.cuda(), 138, *on_gpu, 1, *rows, fuse="mean", eps=EPS)
        kept = lambda y: reference.topk_gather(y, score, 138, fuse="mean")[0]  # noqa: E731
        check_rows(out.cpu(), kept, x, branch, scale, bias)
        check_norm(normed.cpu(), out.cpu(), *norm)


def test_runs_and_batches_are_bitwise_equal():
    for first, again, run in (
        (merged(MERGED), merged(MERGED), lambda rows: merged(MERGED, rows)),
        (gathered(GATHERED, "sum"), gathered(GATHERED, "sum"), lambda rows: gathered(GATHERED, "sum", rows)),
    ):
        assert all(same(a, b) for a, b in zip(first, again, strict=True))
        for b in (0, 7, 15):
            alone = run(slice(b, b + 1))
            assert all(same(a, t[b : b + 1]) for a, t in zip(alone, first, strict=True))


def test_one_launch_each_and_one_for_the_selection():
    x, assign, size = MERGED.x("cuda"), MERGED.assign("cuda"), MERGED.per_token("size", "cuda")
    norm = [t.cuda() for t in affine(384, torch.bfloat16, torch.bfloat16)]
    score = GATHERED.score("cuda")
    for launches, step in (
        (1, lambda: tokred.add_merge_norm(x, x, assign, MERGED.M, *norm, size)),
        (2, lambda: tokred.add_topk_gather_norm(x, x, score, GATHERED.k, *norm, fuse="sum")),
    ):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == launches


@pytest.mark.usefixtures("gigabytes")
def test_offsets_past_2_to_the_31():
    """The last image is what it is alone."""
    B, N, C = 30_000, 197, 384
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    x = torch.randn(1, N, C, device="cuda", dtype=torch.bfloat16).expand(B, -1, -1).contiguous()
    assert x.numel() > 2**31
    assign = (torch.arange(N, device="cuda", dtype=torch.int32) % 184).expand(B, -1)
    score = torch.rand(1, N, device="cuda").expand(B, -1)
    for step in (
        lambda n: tokred.add_merge_norm(x[:n], x[:n], assign[:n], 184, None, None),
        lambda n: tokred.add_topk_gather_norm(x[:n], x[:n], score[:n], 138, None, None, fuse="sum"),
        lambda n: tokred.topk_gather(x[:n], score[:n], 138, fuse="sum"),
    ):
        last = [t[-1:].clone() for t in step(B)]
        assert all(same(a, b) for a, b in zip(last, step(1), strict=True))
