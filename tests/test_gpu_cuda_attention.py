"""The CUDA C++ kernels of attention and attention_scores on a device: the shared cases, graphs, streams, memory."""

from dataclasses import replace

import attention_oracle as oracle
import pytest
import torch
import torch.profiler
from attention_cases import ATTENTION_CASES, AttentionCase
from cases import DTYPES, by_id
from oracle import all_same

import tokred_kernels as tokred

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_kernels")]

DEIT = AttentionCase(B=8, H=6, N=197, D=64, dtype=torch.bfloat16, size_kind="counts")
VIT_384 = AttentionCase(B=2, H=4, N=577, D=64, dtype=torch.float16, size_kind="zeros")
WIDE = AttentionCase(B=2, H=2, N=130, D=72, size_kind="zeros")
STEPS = [replace(case, scores=scores) for case in (DEIT, VIT_384, WIDE) for scores in ("none", "cls", "mean")]


@pytest.fixture(scope="module")
def cuda_kernels():
    try:
        selected = tokred.use_backend("cuda")
        selected.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    selected.__exit__(None, None, None)


def run(case: AttentionCase, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    return tokred.attention(*case.qkv(device), case.size(device), **case.keywords)


@by_id(ATTENTION_CASES + STEPS)
def test_attention(case, poisoned):
    qkv, size = case.qkv("cuda"), case.size("cuda")
    before = [t.clone() for t in qkv]
    out, scores = tokred.attention(*qkv, size, **case.keywords)
    oracle.check(case, out, scores)
    assert all_same(qkv, before)


@by_id([c for c in ATTENTION_CASES + STEPS if c.scores != "none"])
def test_attention_scores(case, poisoned):
    q, k, _ = case.qkv("cuda")
    oracle.check_scores(tokred.attention_scores(q, k, case.size("cuda"), **case.keywords), case)


@by_id(STEPS)
def test_gradients_come_from_triton(case):
    """There is no backward kernel in CUDA C++."""
    leaves = [t.detach().requires_grad_() for t in case.qkv("cuda")]
    results = tokred.attention(*leaves, case.size("cuda"), **case.keywords)
    oracle.check_gradients(case, torch.autograd.grad(results, leaves, case.grads("cuda")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys(dtype):
    """N = 16,384, a few queries against the oracle and all of them among each other: the column mean adds up to 1."""
    case = AttentionCase(B=1, H=2, N=16_384, Nq=33, D=64, dtype=dtype, size_kind="counts", scores="mean")
    oracle.check(case, *run(case))
    q, k, v = (t.cuda() for t in replace(case, Nq=None).qkv())
    scores = tokred.attention(q, k, v, scores="mean")[1]
    assert abs(scores.double().sum().item() - 1) < 1e-5


@by_id(STEPS)
def test_runs_and_batches_are_bitwise_equal(case):
    first = run(case)
    assert all_same(run(case), first)
    q, k, v = case.qkv("cuda")
    size = case.size("cuda")
    for b in range(case.B):
        image = slice(b, b + 1)
        alone = tokred.attention(q[image], k[image], v[image], size[image], **case.keywords)
        assert all_same(alone, [t[image] for t in first])


@by_id(STEPS)
def test_graph_capture_and_replay(case):
    q, k, v = (t.clone() for t in case.qkv("cuda"))
    size = case.size("cuda")
    want = tokred.attention(q.flip(0), k.flip(0), v.flip(0), size.flip(0), **case.keywords)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tokred.attention(q, k, v, size, **case.keywords)
    for t in (q, k, v, size):
        t.copy_(t.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all_same(got, want)


@by_id(STEPS)
def test_nothing_waits_for_the_device(case):
    inputs = (*case.qkv("cuda"), case.size("cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokred.attention(*inputs, **case.keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    """The kernels follow the current stream: on the default one they would read q before it is written."""
    q, k, v = DEIT.qkv("cuda")
    want = tokred.attention(q, k, v, scores="mean")
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        got = tokred.attention(late, k, v, scores="mean")
    stream.synchronize()
    assert all_same(got, want)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    want, got = run(DEIT), run(DEIT, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert all_same([t.cpu() for t in got], [t.cpu() for t in want])


def launches(step) -> list[str]:
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize(
    "case, scores, expected",
    [
        (DEIT, "none", ["attention_kernel"]),
        (DEIT, "cls", ["attention_kernel", "head_mean_kernel"]),
        (DEIT, "mean", ["attention_kernel", "head_mean_kernel"]),
        (VIT_384, "none", ["attention_kernel"]),
        (VIT_384, "cls", ["attention_kernel", "head_mean_kernel"]),
        (VIT_384, "mean", ["attention_kernel", "head_mean_kernel"]),
    ],
)
def test_launches(case, scores, expected):
    inputs = (*case.qkv("cuda"), case.size("cuda"))
    names = launches(lambda: tokred.attention(*inputs, scores=scores))
    assert len(names) == len(expected), names
    assert all(kernel in name for kernel, name in zip(expected, names, strict=True)), names


@by_id(STEPS)
def test_peak_memory_stays_within_its_bound(case):
    inputs = (*case.qkv("cuda"), case.size("cuda"))
    run(case)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = tokred.attention(*inputs, **case.keywords)
    extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in outputs)
    heads = case.B * case.H
    allowed = 4 * heads * case.N * -(-min(case.N, 1024) // 64) + 8 * heads * case.N
    assert extra <= allowed + 3 * 512  # the allocator's rounding


@pytest.mark.usefixtures("gigabytes")
def test_offsets_past_2_to_the_31():
    """The last image begins after element 2^31; its rows are far apart."""
    B, N, D = 3, 5, 64
    stride = 2**28
    if torch.cuda.mem_get_info()[0] < 1.2 * 2 * B * N * stride:
        pytest.skip(f"needs {2 * B * N * stride >> 30} GiB of device memory")
    memory = torch.zeros(B * N * stride, dtype=torch.bfloat16, device="cuda")
    x = memory.view(B, 1, N, stride)[..., :D]
    x.copy_(torch.randn(B, 1, N, D))
    assert all_same(tokred.attention(x, x, x, scores="mean"), tokred.attention(*[x.contiguous()] * 3, scores="mean"))
