"""The CUDA C++ kernels on a device: the shared cases against the oracle, streams, graphs, devices, memory, launches."""

import os
import subprocess
import sys

import oracle
import pytest
import torch
import torch.profiler
from cases import DTYPES, MATCH_CASES, MERGE_CASES, TWO_WAY_CASES, MatchCase, MergeCase

import tokred_kernels as tokred

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_kernels", "poisoned")]

DEIT = MatchCase(B=8, N=197, C=384, H=6, D=64, r=13, dtype=torch.bfloat16, trap="alike")
VIT_384 = MatchCase(B=4, N=577, C=64, H=4, D=64, r=40, dtype=torch.float16, trap="alike")
DEEP = MatchCase(B=2, N=197, C=64, H=0, D=384, r=13, trap="alike")
STEPS = [DEIT, VIT_384, DEEP]


@pytest.fixture
def cuda_kernels():
    if tokred.info()["match"]["cuda"] != "cuda":
        pytest.skip(f"no CUDA C++ kernels: {tokred.info()['reasons'].get('cuda', 'another backend is selected')}")
    with tokred.use_backend("cuda"):
        yield


def step_inputs(case: MatchCase, device: str = DEVICE) -> tuple:
    return case.x(device), case.metric(device), case.r, case.p, case.size(device)


def merge_inputs(case: MergeCase, device: str = DEVICE) -> tuple:
    return case.x(device), case.assign(device), case.M, case.per_token("size", device), case.per_token("weight", device)


def assert_same(got, want) -> None:
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have.cpu(), wanted.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", MATCH_CASES + TWO_WAY_CASES, ids=lambda c: c.id)
def test_match(case):
    metric, weight = case.metric(DEVICE), case.weight(DEVICE)
    before = metric.clone()
    assign = tokred.match(metric, case.r, case.p, weight, **case.keywords).cpu()
    oracle.check_assign(assign, case.metric(), case.r, case.p, case.weight(), **case.keywords)
    assert_same([metric], [before])


@pytest.mark.parametrize("reduce", ["mean", "sum", "amax"])
@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda c: c.id)
def test_merge(case, reduce):
    inputs = merge_inputs(case)
    got = tokred.merge(*inputs, reduce=reduce)
    x, assign, m, size, weight = merge_inputs(case, "cpu")
    oracle.check_merge(got, x, assign, m, size, weight, reduce)
    assert_same(inputs[:2], (x, assign))


@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda c: c.id)
def test_unmerge(case):
    with tokred.use_backend("reference"):
        want = tokred.unmerge(case.y(), case.assign())
    assert_same([tokred.unmerge(case.y(DEVICE), case.assign(DEVICE))], [want])


@pytest.mark.parametrize("case", [*STEPS, *(c for c in MATCH_CASES if not c.weighted)], ids=lambda c: c.id)
def test_match_merge(case):
    out, size_out, assign = tokred.match_merge(*step_inputs(case))
    oracle.check_assign(assign.cpu(), case.metric(), case.r, case.p)
    oracle.check_merge((out, size_out), case.x(), assign, out.shape[1], case.size())


@pytest.mark.parametrize("case", STEPS, ids=lambda c: c.id)
def test_two_runs_are_bitwise_equal(case):
    inputs = step_inputs(case)
    assert_same(tokred.match_merge(*inputs), tokred.match_merge(*inputs))


@pytest.mark.parametrize("case", STEPS, ids=lambda c: c.id)
def test_a_dependent_launch_is_an_ordinary_one(case):
    """In match_merge merge begins before match has ended, by itself it does not. Outputs lie where earlier ones lay,
    full of poison: what is read too early shows."""
    inputs = step_inputs(case)
    for x, metric, r, p, size in 100 * [inputs, [t.flip(0) if isinstance(t, torch.Tensor) else t for t in inputs]]:
        out, size_out, assign = tokred.match_merge(x, metric, r, p, size)
        want = tokred.match(metric, r, p)
        assert_same((assign, out, size_out), (want, *tokred.merge(x, want, out.shape[1], size)))


@pytest.mark.parametrize("case", STEPS, ids=lambda c: c.id)
def test_an_image_alone_is_that_of_the_batch(case):
    """At N = 577 a large batch takes one block an image and a single image several."""
    x, metric, r, p, size = step_inputs(case)
    x, metric, size = (t.repeat(40, *[1] * (t.dim() - 1)) for t in (x, metric, size))
    whole = tokred.match_merge(x, metric, r, p, size)
    for b in range(case.B):
        assert_same(
            tokred.match_merge(x[b : b + 1], metric[b : b + 1], r, p, size[b : b + 1]), [t[b, None] for t in whole]
        )


@pytest.mark.parametrize("N", [4096, 16384, 65536])
def test_match_of_many_tokens(N):
    """float64 scores a slice of rows at a time: the choices must be within the precision rule."""
    torch.use_deterministic_algorithms(False)  # cuBLAS, which the check multiplies with, would refuse
    k = torch.randn(1, N, 32, generator=torch.Generator().manual_seed(N)).to(DEVICE)
    r = N // 4
    assign = tokred.match(k, r)[0]
    unit = torch.nn.functional.normalize(k[0].double(), dim=-1)
    a, b = unit[2::2], unit[1::2]
    best = torch.cat([(rows @ b.T).amax(1) for rows in a.split(1024)])
    first_b = 1 + len(a) - r
    of_a = assign[2::2]
    gone = of_a >= first_b
    chosen = (a[gone] * b[(of_a[gone] - first_b).long()]).sum(-1)
    assert gone.sum() == r
    assert (chosen >= best[gone] - oracle.MARGIN).all()
    assert best[gone].min() >= best[~gone].max() - oracle.MARGIN
    assert torch.equal(of_a[~gone].cpu(), torch.arange(1, first_b, dtype=torch.int32))


@pytest.mark.parametrize("case", STEPS, ids=lambda c: c.id)
def test_graph_capture_and_replay(case):
    torch.use_deterministic_algorithms(False)  # filling new memory would be captured too
    x, metric, r, p, size = step_inputs(case)
    want = tokred.match_merge(x.flip(0), metric.flip(0), r, p, size.flip(0))
    tokred.unmerge(*tokred.match_merge(x, metric, r, p, size)[::2])  # every kernel is loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tokred.match_merge(x, metric, r, p, size)
        back = tokred.unmerge(got[0], got[2])
    for t in (x, metric, size):
        t.copy_(t.flip(0))
    graph.replay()
    assert_same(got, want)
    assert_same([back], [tokred.unmerge(want[0], want[2])])


def test_another_stream():
    """The kernels follow the current stream: on the default one they would read x before it is written."""
    x, metric, r, p, size = step_inputs(DEIT)
    want = tokred.match_merge(x, metric, r, p, size)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        got = tokred.match_merge(late, metric, r, p, size)
    stream.synchronize()
    assert_same(got, want)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    want = tokred.match_merge(*step_inputs(DEIT))
    got = tokred.match_merge(*step_inputs(DEIT, "cuda:1"))
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert torch.cuda.current_device() == 0
    assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.usefixtures("gigabytes")
def test_offsets_past_2_to_the_31(dtype):
    """The last image begins after element 2^31."""
    B, N, C, M = 3, 64, 2**24 + 8, 2
    needed = B * (2 * N + M) * C * 2
    if torch.cuda.mem_get_info()[0] < 1.1 * needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    torch.use_deterministic_algorithms(False)
    x = torch.zeros(B, N, C, dtype=dtype, device=DEVICE)
    x[-1, :, -3:] = torch.arange(N, device=DEVICE, dtype=dtype)[:, None]
    assert x[-1].data_ptr() - x.data_ptr() > 2**31 * x.element_size()
    assign = (torch.arange(N, device=DEVICE) % M).int().repeat(B, 1)
    out, size_out = tokred.merge(x, assign, M)
    assert torch.equal(out[-1, :, -3:].cpu(), torch.tensor([[31.0], [32.0]]).to(dtype).expand(2, 3))
    assert (size_out == N // M).all()
    back = tokred.unmerge(out, assign)
    assert torch.equal(back[-1, :, -1].cpu(), out[-1, :, -1].cpu().repeat(N // M))


def launches(step) -> list[str]:
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("case, kernels", [(DEIT, 1), (DEEP, 5)], ids=["one-block", "several-blocks"])
def test_launches_of_match_in_both_ways(case, kernels):
    torch.use_deterministic_algorithms(False)
    metric = case.metric(DEVICE)
    assert len(launches(lambda: tokred.match(metric, case.r, case.p, two_way=True))) == kernels


def test_a_step_is_two_launches_and_allocates_its_outputs():
    torch.use_deterministic_algorithms(False)
    inputs = step_inputs(DEIT)
    names = launches(lambda: tokred.match_merge(*inputs))
    assert len(names) == 2, names
    assert "match_kernel" in names[0]
    assert "merge_kernel" in names[1]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = tokred.match_merge(*inputs)
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()  # no scratch
    assert torch.cuda.memory_allocated() - before <= sum(t.nbytes for t in outputs) + 3 * 512


DEBUG_PROGRAM = """
import torch, tokred_kernels as tokred
x, assign = torch.ones(1, 4, 8, device="cuda"), torch.tensor([[0, 1, 7, -1]], device="cuda", dtype=torch.int32)
for op in (lambda: tokred.merge(x, assign, 2), lambda: tokred.unmerge(x[:, :2], assign)):
    try:
        op()
    except RuntimeError as error:
        print(error)
tokred.merge(x, assign.clamp(max=1), 2)
"""


def test_debug_makes_an_assign_that_is_no_row_an_error():
    done = subprocess.run(
        [sys.executable, "-c", DEBUG_PROGRAM],
        env={**os.environ, "TOKRED_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["merge", "unmerge"]
    assert all("assign must be in [-1, m) = [-1, 2)" in line and "got 7" in line for line in lines)
