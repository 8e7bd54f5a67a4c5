"""The Triton kernels of attention on a device: the shared cases, gradients, graphs, streams, launches, memory."""

from dataclasses import replace

import attention_oracle as oracle
import pytest
import torch
import torch.profiler
from attention_cases import ATTENTION_CASES, DIFFERENTIABLE, AttentionCase
from cases import DTYPES, by_id
from oracle import all_same, same

import tokred_kernels as tokred

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]

DEIT = AttentionCase(B=8, H=6, N=197, D=64, dtype=torch.bfloat16, size_kind="counts")
VIT_384 = AttentionCase(B=2, H=4, N=577, D=64, dtype=torch.float16, size_kind="zeros")
WIDE = AttentionCase(B=2, H=2, N=130, D=72, size_kind="zeros")
STEPS = [replace(case, scores=scores) for case in (DEIT, VIT_384, WIDE) for scores in ("none", "cls", "mean")]


@pytest.fixture(scope="module")
def triton_kernels():
    with tokred.use_backend("triton"):
        yield


def inputs(case: AttentionCase, device: str = "cuda") -> tuple:
    """q, k, v, size, and the gradients of out and scores."""
    return *case.qkv(device), case.size(device), *case.grads(device)


def step(case: AttentionCase, q, k, v, size, grad_out, grad_scores) -> tuple[torch.Tensor, ...]:
    """out, scores, dq, dk, dv."""
    out, scores = tokred.attention(q, k, v, size, **case.keywords)
    grads = torch.ops.tokred.attention_backward(grad_out, grad_scores, q, k, v, out, size, **case.keywords)
    return out, scores, *grads


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


@by_id([c for c in ATTENTION_CASES + STEPS if c.trap in DIFFERENTIABLE])
def test_attention_backward(case, poisoned):
    given = inputs(case)
    before = [None if t is None else t.clone() for t in given]
    oracle.check_gradients(case, step(case, *given)[2:])
    assert all(a is None or same(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("absent", ["out", "scores", "both"])
@by_id([replace(case, scores=scores) for case in (DEIT, WIDE) for scores in ("cls", "mean")])
def test_an_absent_gradient_is_zero(case, absent, poisoned):
    *given, of_out, of_scores = inputs(case)
    with_out, with_scores = absent == "scores", absent == "out"
    grads = step(case, *given, of_out if with_out else None, of_scores if with_scores else None)[2:]
    oracle.check_gradients(case, grads, with_out, with_scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys(dtype):
    """N = 16,384, a few queries against the oracle and all of them among each other: the column mean adds up to 1."""
    case = AttentionCase(B=1, H=2, N=16_384, Nq=33, D=64, dtype=dtype, size_kind="counts", scores="mean")
    out, scores, *grads = step(case, *inputs(case))
    oracle.check(case, out, scores)
    oracle.check_gradients(case, grads)
    q, k, v = replace(case, Nq=None).qkv("cuda")
    scores = tokred.attention(q, k, v, scores="mean")[1]
    assert abs(scores.double().sum().item() - 1) < 1e-5


@by_id(STEPS)
def test_runs_and_batches_are_bitwise_equal(case):
    given = inputs(case)
    first = step(case, *given)
    assert all_same(step(case, *given), first)
    for b in range(case.B):
        alone = step(case, *[t[b : b + 1] for t in given])
        assert all_same(alone, [t[b : b + 1] for t in first])


@pytest.mark.parametrize("scores", ["cls", "mean"])
def test_opcheck(scores):
    q, k, v, size, grad_out, grad_scores = inputs(AttentionCase(N=15, D=8, size_kind="zeros", scores=scores))
    keywords = {"scores": scores}
    ops = torch.ops.tokred
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(ops.attention.default, (*leaves, size), keywords)
    torch.library.opcheck(ops.attention_scores.default, (*leaves[:2], size), keywords)
    out, _ = ops.attention(q, k, v, size, **keywords)
    torch.library.opcheck(ops.attention_backward.default, (grad_out, grad_scores, q, k, v, out, size), keywords)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autograd(compiled):
    case = AttentionCase(N=70, D=32, size_kind="counts", scores="mean", dtype=torch.bfloat16)
    *qkv, size, grad_out, grad_scores = inputs(case)
    leaves = [t.detach().requires_grad_() for t in qkv]
    attention = torch.compile(tokred.attention, fullgraph=True, backend="aot_eager") if compiled else tokred.attention
    results = attention(*leaves, size, **case.keywords)
    oracle.check_gradients(case, torch.autograd.grad(results, leaves, (grad_out, grad_scores)))


@by_id(STEPS)
def test_graph_capture_and_replay(case):
    given = [t.clone() for t in inputs(case)]
    want = step(case, *[t.flip(0) for t in given])
    step(case, *given)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(case, *given)
    for t in given:
        t.copy_(t.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all_same(got, want)


@by_id(STEPS)
def test_nothing_waits_for_the_device(case):
    given = inputs(case)
    step(case, *given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    """The kernels follow the current stream: on the default one they would read q before it is written."""
    case = replace(DEIT, scores="mean")
    q, *others = inputs(case)
    want = step(case, q, *others)
    late = torch.full_like(q, torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        got = step(case, late, *others)
    stream.synchronize()
    assert all_same(got, want)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    want, got = step(DEIT, *inputs(DEIT)), step(DEIT, *inputs(DEIT, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all_same([t.cpu() for t in got], [t.cpu() for t in want])


def launches(call) -> list[str]:
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


BACKWARD = ["rows_kernel", "queries_kernel", "keys_kernel"]


@pytest.mark.parametrize(
    "case, expected",
    [
        (replace(DEIT, scores="none"), ["attention_row_kernel", *BACKWARD]),
        (replace(DEIT, scores="cls"), ["attention_row_kernel", "scores_kernel", *BACKWARD]),
        (replace(VIT_384, scores="none"), ["attention_online_kernel", *BACKWARD]),
        (replace(VIT_384, scores="mean"), ["attention_online_kernel", "columns_kernel", "scores_kernel", *BACKWARD]),
    ],
    ids=["row", "row-cls", "online", "online-mean"],
)
def test_launches(case, expected):
    given = inputs(case)
    names = launches(lambda: step(case, *given))
    assert len(names) == len(expected), names
    assert all(kernel in name for kernel, name in zip(expected, names, strict=True)), names


@by_id(STEPS)
def test_peak_memory_stays_within_its_bound(case):
    q, k, v, size, *grads = inputs(case)
    out, _ = tokred.attention(q, k, v, size, **case.keywords)

    def backward():
        return torch.ops.tokred.attention_backward(*grads, q, k, v, out, size, **case.keywords)

    def extra(call) -> int:
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = call()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in outputs)

    heads = case.B * case.H
    allowed = 4 * heads * case.N * -(-min(case.N, 1024) // 64) + 8 * heads * case.N
    rounding = 5 * 512  # the allocator's
    assert extra(lambda: tokred.attention(q, k, v, size, **case.keywords)) <= allowed + rounding
    assert extra(backward) <= 12 * heads * case.N + rounding


@pytest.mark.usefixtures("gigabytes")
def test_offsets_past_2_to_the_31():
    """The last rows begin after element 2^31."""
    B, N, D = 3, 5, 64
    stride = 2**28
    if torch.cuda.mem_get_info()[0] < 1.2 * 2 * B * N * stride:
        pytest.skip(f"needs {2 * B * N * stride >> 30} GiB of device memory")
    memory = torch.zeros(B * N * stride, dtype=torch.bfloat16, device="cuda")
    far = memory.view(B, 1, N, stride)[..., :D]
    far.copy_(torch.randn(B, 1, N, D))
    near = far.contiguous()
    case = AttentionCase(scores="mean")
    grad_scores = torch.ones(B, N, device="cuda")
    want = step(case, near, near, near, None, near, grad_scores)
    assert all_same(step(case, far, far, far, None, far, grad_scores), want)


def test_few_lengths_compile_few_variants():
    """A DeiT that loses 13 tokens a block: one variant for each 32 keys, whatever N is."""
    from tokred_kernels.triton.attention import attention_row_kernel

    def variants() -> int:
        return len(attention_row_kernel.device_caches[torch.cuda.current_device()][0])

    before = variants()
    for n in range(12):
        case = replace(DEIT, B=2, N=197 - 13 * n)
        tokred.attention(*case.qkv("cuda"), case.size("cuda"), scores="cls")
    assert variants() - before <= 6
