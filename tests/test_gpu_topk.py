"""topk and topk_gather on a device, by the CUDA C++ and by the Triton kernels, over the shared cases."""

import pytest
import torch
from cases import by_id
from oracle import same
from topk_cases import FUSE, TOPK_CASES, TopkCase
from topk_oracle import check_assign, check_gather

import tokred_kernels as tokred

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

DEIT = TopkCase(B=16, N=197, C=384, k=138, dtype=torch.bfloat16)


@pytest.fixture(params=["cuda", "triton"], scope="module")
def kernels(request):
    try:
        selected = tokred.use_backend(request.param)
        selected.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    selected.__exit__(None, None, None)


def run(case: TopkCase, fuse: str, device: str = "cuda"):
    return tokred.topk_gather(case.x(device), case.score(device), case.k, case.p, fuse=fuse)


@pytest.mark.parametrize("fuse", FUSE)
@by_id(TOPK_CASES)
def test_topk_gather(case, fuse, poisoned):
    x, score = case.x("cuda"), case.score("cuda")
    before = x.clone(), score.clone()
    got = tokred.topk_gather(x, score, case.k, case.p, fuse=fuse)
    check_gather(got, x, score, case.k, case.p, fuse)
    assert same(x, before[0]) and same(score, before[1])


@by_id([c for c in TOPK_CASES if c.score_dtype != torch.float64])
def test_topk(case, poisoned):
    score = case.score("cuda")
    check_assign(tokred.topk(score, case.k, case.p, True), score, case.k, case.p, True)


@pytest.mark.parametrize("N", [16_384, 70_000])
def test_many_tokens(N):
    case = TopkCase(B=2, N=N, C=24, k=N // 3, trap="ties")
    check_gather(run(case, "mean"), case.x(), case.score(), case.k, case.p, "mean")


def test_runs_and_batches_are_bitwise_equal():
    first = run(DEIT, "mean")
    for _ in range(3):
        assert all(same(a, b) for a, b in zip(first, run(DEIT, "mean"), strict=True))
    x, score = DEIT.x("cuda"), DEIT.score("cuda")
    for b in (0, 7, 15):
        alone = tokred.topk_gather(x[b : b + 1], score[b : b + 1], DEIT.k, fuse="mean")
        assert all(same(a, t[b : b + 1]) for a, t in zip(alone, first, strict=True))


def test_graph_capture_and_replay():
    x, score = DEIT.x("cuda"), DEIT.score("cuda")
    want = tokred.topk_gather(x.flip(0), score.flip(0), DEIT.k, fuse="sum")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tokred.topk_gather(x, score, DEIT.k, fuse="sum")
    x.copy_(x.flip(0))
    score.copy_(score.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_on_the_current_stream():
    """Behind a slow kernel on a side stream: on another stream the op would read x before it is written."""
    want, score = run(DEIT, "sum"), DEIT.score("cuda")
    late = torch.full_like(DEIT.x("cuda"), torch.nan)
    source = DEIT.x("cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(source)
        got = tokred.topk_gather(late, score, DEIT.k, fuse="sum")
    stream.synchronize()
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_two_launches_no_sync_and_no_scratch():
    x, score = DEIT.x("cuda"), DEIT.score("cuda")

    def step():
        return tokred.topk_gather(x, score, DEIT.k, fuse="mean")

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
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 2 and "topk_kernel" in names[0] and "gather_kernel" in names[1], names
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() - before <= sum(t.nbytes for t in outputs) + 2 * 512


@pytest.mark.usefixtures("gigabytes")
def test_offsets_past_2_to_the_31():
    """The last image begins after element 2^31."""
    B, N, C = 30_000, 197, 384
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    x = torch.randn(1, N, C, device="cuda", dtype=torch.bfloat16).expand(B, -1, -1).contiguous()
    assert x.numel() > 2**31
    score = torch.rand(1, N, device="cuda").expand(B, -1)
    got = tokred.topk_gather(x, score, 138, fuse="mean")
    alone = tokred.topk_gather(x[:1], score[:1], 138, fuse="mean")
    assert all(same(a, t[-1:]) for a, t in zip(alone, got, strict=True))


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    got = run(DEIT, "mean", "cuda:1")
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert all(same(a.cpu(), b.cpu()) for a, b in zip(got, run(DEIT, "mean"), strict=True))


def test_float64_is_refused():
    expected = "must be float32, float16 or bfloat16 on a CUDA device, got float64"
    score = torch.rand(1, 5, device="cuda", dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"^topk: score {expected}"):
        tokred.topk(score, 2)
    with pytest.raises(RuntimeError, match=f"^topk_gather: x {expected}"):
        tokred.topk_gather(score[..., None], score, 2)
