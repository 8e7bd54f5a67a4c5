"""The Triton kernels on a device: the table of cases against the oracle, and what only a device can show."""

import pytest
import torch
from cases import MATCH_CASES, MERGE_CASES, TWO_WAY_CASES, MatchCase, by_id
from oracle import all_same, check_assign, check_merge, edge_scores, same

import tokred_kernels as tokred

pytestmark = pytest.mark.gpu
REDUCE = ("mean", "sum", "amax")


@pytest.fixture(autouse=True, scope="module")
def backend():
    with tokred.use_backend("triton"):
        yield


@by_id(MATCH_CASES + TWO_WAY_CASES)
def test_match(case, poisoned):
    metric, weight = case.metric("cuda"), case.weight("cuda")
    before = metric.clone()
    assign = tokred.match(metric, case.r, case.p, weight, **case.keywords)
    check_assign(assign.cpu(), metric.cpu(), case.r, case.p, weight, **case.keywords)
    assert same(metric, before)


@by_id(MATCH_CASES)
def test_match_merge(case, poisoned):
    x, metric, size = case.x("cuda"), case.metric("cuda"), case.size("cuda")
    out, size_out, assign = tokred.match_merge(x, metric, case.r, case.p, size)
    check_assign(assign.cpu(), metric.cpu(), case.r, case.p)
    M = case.N - max(0, min(case.r, (case.N - case.p) // 2))
    check_merge((out, size_out), x, assign, M, size)


@pytest.mark.parametrize("reduce", REDUCE)
@by_id(MERGE_CASES)
def test_merge(case, reduce, poisoned):
    inputs = case.x("cuda"), case.assign("cuda"), case.per_token("size", "cuda"), case.per_token("weight", "cuda")
    x, assign, size, weight = inputs
    before = [None if t is None else t.clone() for t in inputs]
    got = tokred.merge(x, assign, case.M, size, weight, reduce=reduce)
    check_merge(got, x, assign, case.M, size, weight, reduce)
    assert all(a is None or same(a, b) for a, b in zip(inputs, before, strict=True))


@by_id(MERGE_CASES)
def test_unmerge(case, poisoned):
    y, assign = case.y("cuda"), case.assign("cuda")
    with tokred.use_backend("reference"):
        want = tokred.unmerge(y, assign)
    assert same(tokred.unmerge(y, assign), want)


def step(B: int, N: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"):
    """Inputs of a DeiT-S step of match_merge."""
    case = MatchCase(B=B, N=N, C=384, H=6, D=64, r=13, dtype=dtype, trap="alike")
    return case.x(device), case.metric(device), case.r, case.p, case.size(device)


@pytest.mark.parametrize("weighted", [False, True], ids=["cosine", "weighted"])
@pytest.mark.parametrize("D", [3, 64, 200, 1024])
def test_edges_obey_the_precision_rule(D, weighted, monkeypatch):
    """Tensor cores truncate their sums: edge scores may still be 1e-6 off at most."""
    from tokred_kernels.triton import match

    kernel, launched = match.edges_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (kernel[grid](*args, **kwargs), launched.append(args))

    monkeypatch.setattr(match, "edges_kernel", Recorder())
    case = MatchCase(B=1, N=300, H=2, D=D, trap="alike", weighted=weighted, power=2.0)
    weight = case.weight("cuda")
    tokred.match(case.metric("cuda"), case.r, case.p, weight, power=case.power)
    exact, _, _ = edge_scores(case.metric()[0], case.p, case.weight()[0] if weighted else None, case.power)
    edge = launched[0][2]
    assert (edge.double().cpu() - torch.from_numpy(exact.max(1))).abs().max() < 1e-6


def test_equal_rows_tie_wherever_they_sit():
    """Tensor cores must give equal rows equal scores in every tile: 30 equal edges, the best 40 rows end in a tie."""
    metric = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).repeat(30, 1)[None]
    assert check_assign(tokred.match(metric.cuda(), 40, 0).cpu(), metric, 40, 0) == 1


@pytest.mark.parametrize("D", [64, 384, 1024])
def test_nearly_tied_keys(D):
    """The precision rule on tensor cores, which truncate their sums: float64 decides most images by more than it."""
    g = torch.Generator().manual_seed(0)
    keys = 4 * torch.randn(1, 1, D, generator=g) + 1.2 * torch.randn(16, 197, D, generator=g)
    assert check_assign(tokred.match(keys.cuda(), 13).cpu(), keys, 13, 1) >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_equal_over_runs_and_batches(dtype):
    inputs = step(64, 197, dtype)
    first = tokred.match_merge(*inputs)
    for _ in range(5):
        assert all_same(first, tokred.match_merge(*inputs))
    x, metric, r, p, size = inputs
    for b in (0, 17, 63):
        alone = tokred.match_merge(x[b : b + 1], metric[b : b + 1], r, p, size[b : b + 1])
        assert all_same(alone, [t[b : b + 1] for t in first])


def test_graph_capture_and_replay():
    inputs = step(8, 197)
    expected = tokred.match_merge(*inputs)  # compiles outside the capture
    tokred.unmerge(expected[0], expected[2])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tokred.match_merge(*inputs)
        back = tokred.unmerge(captured[0], captured[2])
    inputs[0].copy_(inputs[0].flip(0))  # new values in the same memory
    expected = tokred.match_merge(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert all_same(expected, captured)
    assert same(tokred.unmerge(expected[0], expected[2]), back)


def test_on_the_current_stream():
    """Behind a slow kernel on a side stream: on another stream the op would read x before it is written."""
    inputs = step(4, 197)
    expected = tokred.match_merge(*inputs)
    x = torch.full_like(inputs[0], torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(inputs[0])
        got = tokred.match_merge(x, *inputs[1:])
    stream.synchronize()
    assert all_same(expected, got)


def test_no_host_sync():
    inputs = step(4, 197)
    tokred.match_merge(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokred.match_merge(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_twelve_lengths_compile_few_variants():
    from tokred_kernels.triton import match, merge

    kernels = match.unit_kernel, match.edges_kernel, match.assign_kernel, merge.merge_kernel
    device = torch.cuda.current_device()
    before = sum(len(k.device_caches[device][0]) for k in kernels)
    for n in range(12):
        tokred.match_merge(*step(2, 197 - 13 * n, torch.float16))
    assert sum(len(k.device_caches[device][0]) for k in kernels) - before <= 7


@pytest.mark.usefixtures("gigabytes")
def test_offsets_past_2_to_the_31():
    B, N, C = 30_000, 197, 384
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    x = torch.randn(1, N, C, device="cuda", dtype=torch.bfloat16).expand(B, -1, -1).contiguous()
    assert x.numel() > 2**31
    assign = (torch.arange(N, device="cuda", dtype=torch.int32) % 184).expand(B, -1).contiguous()
    out, size_out = tokred.merge(x, assign, 184)
    alone = tokred.merge(x[:1], assign[:1], 184)
    assert all_same(alone, (out[-1:], size_out[-1:]))
    del x
    back = tokred.unmerge(out, assign)
    assert same(back[-1:], tokred.unmerge(alone[0], assign[:1]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_the_device_of_its_tensors():
    x, metric, r, p, size = step(2, 197)
    got = tokred.match_merge(x.to("cuda:1"), metric.to("cuda:1"), r, p, size.to("cuda:1"))
    assert all(t.device.index == 1 for t in got)
    assert all_same(tokred.match_merge(x, metric, r, p, size), [t.to("cuda:0") for t in got])
