"""attention and attention_scores on the CPU, by every instruction set and by the reference, over the table of cases."""

import math
import re

import attention_oracle
import pytest
import torch
import torch.nn.functional as F
from attention_cases import ATTENTION_CASES, AttentionCase, in_float64
from cases import by_id
from oracle import same

import tokred_kernels as tokred
from benchmarks import noise_free
from tokred_kernels import reference

ALL_CASES = ATTENTION_CASES + in_float64(ATTENTION_CASES)
PLAIN = AttentionCase(B=2, N=70, H=3, size_kind="counts", scores="mean")


@pytest.mark.parametrize("seed", [1, 3, 5])
@pytest.mark.parametrize("N", [577, 1025])
def test_sums_over_many_keys_err_no_more_than_twice_torchs(N, seed, attention_backend):
    """With near-equal masses one chain of sums over all keys did: a 384 px model failed its check."""
    torch.manual_seed(seed)
    q, k, v = 0.2 * torch.randn(1, 6, 64, 64), 0.2 * torch.randn(1, 6, N, 64), torch.randn(1, 6, N, 64)
    size = torch.randint(1, 5, (1, N)).float()
    exact = reference.attention(q.double(), k.double(), v.double(), size)[0]
    usual = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None])
    errors = [(out - exact).abs().amax() for out in (tokred.attention(q, k, v, size)[0], usual)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * exact.abs().amax()


@pytest.fixture
def kernels(attention_backend):
    if attention_backend == "reference":
        pytest.skip("the reference's bits and memory are those of PyTorch's matrix product")


def copies(tensors) -> list:
    return [None if t is None else t.clone() for t in tensors]


def assert_same(tensors, others) -> None:
    assert all(a is None or same(a, b) for a, b in zip(tensors, others, strict=True))


@by_id(ALL_CASES)
def test_attention_and_its_scores_alone(case, attention_backend, poisoned):
    inputs = *case.qkv(), case.size()
    before = copies(inputs)
    results = tokred.attention(*inputs, **case.keywords)
    attention_oracle.check(case, *results)
    if case.scores != "none":
        alone = tokred.attention_scores(*inputs[:2], inputs[3], **case.keywords)
        attention_oracle.check_scores(alone, case)
    assert_same(inputs, before)
    storages = {t.untyped_storage().data_ptr() for t in inputs if t is not None and t.numel()}
    assert not storages & {t.untyped_storage().data_ptr() for t in results if t.numel()}


@by_id([c for c in ATTENTION_CASES if c.B > 1])
def test_one_image_alone_equals_the_batch(case, kernels):
    q, k, v, size = *case.qkv(), case.size()
    batch = tokred.attention(q, k, v, size, **case.keywords)
    for b in range(case.B):
        one = [None if t is None else t[b : b + 1] for t in (q, k, v, size)]
        assert_same(tokred.attention(*one, **case.keywords), [whole[b : b + 1] for whole in batch])


@by_id(
    [
        AttentionCase(B=1, H=1, N=577, D=64, size_kind="counts", scores="mean"),
        AttentionCase(B=1, H=3, N=197, D=64, size_kind="zeros", scores="mean", dtype=torch.bfloat16),
        AttentionCase(B=3, H=2, N=130, D=40, scores="cls", dtype=torch.float16),
        AttentionCase(B=1, H=1, N=1100, D=32, size_kind="counts", scores="mean"),
    ]
)
def test_bitwise_equal_over_threads_and_runs(case, kernels):
    q, k, v, size = *case.qkv(), case.size()

    def both():
        scores = tokred.attention_scores(q, k, size, **case.keywords)
        return *tokred.attention(q, k, v, size, **case.keywords), scores

    assert noise_free.bitwise_equal(both, threads=(1, 2, 5), runs=2)


@by_id(
    [
        AttentionCase(B=2, H=3, N=197, D=64, size_kind="counts", scores="mean"),
        AttentionCase(B=1, H=2, N=577, D=64, size_kind="float64", scores="mean", dtype=torch.bfloat16),
        AttentionCase(B=1, H=1, N=1500, D=32, scores="mean"),
        AttentionCase(B=2, H=1, N=5, Nq=700, scores="cls", dtype=torch.float16),
        AttentionCase(B=1, H=2, N=700, Nq=1, size_kind="zeros", scores="cls"),
        AttentionCase(B=1, H=2, N=300, scores="none"),
    ]
)
def test_memory_stays_below_16_rows_a_head(case, kernels):
    """Whatever N is: the by-products of at most 16 chunks of queries, and two numbers a query."""
    q, k, v, size = *case.qkv(), case.size()
    B, H, N = case.B, case.H, case.N
    bound = 4 * B * H * N * math.ceil(min(N, 1024) / 64) + 8 * B * H * case.queries

    def extra(call) -> int:
        return noise_free.allocated_bytes(call) - noise_free.nbytes(call())

    assert extra(lambda: tokred.attention(q, k, v, size, **case.keywords)) <= bound
    if case.scores != "none":
        assert extra(lambda: tokred.attention_scores(q, k, size, **case.keywords)) <= bound


def peak_kilobytes() -> int:
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read()).group(1))


def reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError as error:
        pytest.skip(f"needs a Linux that resets the peak of the resident set: {error}")


@pytest.fixture(scope="module")
def long():
    """(q, k, v, size, rows, exact rows of out, exact cls and mean scores) of 16,384 tokens, in float64 by chunks."""
    case = AttentionCase(B=1, H=1, N=16_384, D=32, size_kind="zeros")
    q, k, v, size = *case.qkv(), case.size()
    Q, K, V = (t[0, 0].double() for t in (q, k, v))
    rows = torch.randint(0, case.N, (40,), generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(case.N, dtype=torch.float64)

    def matrix(queries):
        return (queries @ K.T * 32**-0.5 + size[0].double().log()).softmax(1)

    for chunk in Q.split(1024):
        mean += matrix(chunk).sum(0)
    return q, k, v, size, rows, matrix(Q[rows]) @ V, {"cls": matrix(Q[:1])[0], "mean": mean / case.N}


@pytest.mark.parametrize("scores", ["cls", "mean"])
def test_16384_tokens(scores, long, kernels):
    """In the memory of 16 rows, where the attention matrix has 1 GiB."""
    q, k, v, size, rows, exact_rows, exact_scores = long
    tokred.attention(q[:, :, :64], k, v, size, scores=scores)  # the threads are there and have their scratch
    reset_peak()
    before = peak_kilobytes()
    out, emitted = tokred.attention(q, k, v, size, scores=scores)
    grown = 1024 * (peak_kilobytes() - before)
    bound = 4 * q.shape[2] * 16 + 8 * q.shape[2]
    assert grown <= noise_free.nbytes((out, emitted)) + bound + 2**22  # and what the allocator rounds up
    # The sum of 16,384 masses in float32 is off by up to sqrt(N) / 4 units, 32 * 2^-23 = 4e-6.
    torch.testing.assert_close(out[0, 0, rows].double(), exact_rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(emitted[0].double(), exact_scores[scores], rtol=1e-5, atol=0)
    assert (emitted[0][size[0] == 0] == 0).all()


def test_offsets_past_2_to_the_31(kernels):
    """Rows 2^30 elements apart: memory of which only the rows themselves are ever touched."""
    far = 2**30
    memory = torch.empty(3 * far + 64, dtype=torch.bfloat16)
    t = memory.as_strided((1, 2, 4, 16), (0, 16, far, 1))
    t.copy_(torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(0)))
    near = t.clone()
    assert_same(tokred.attention(t, t, t, scores="mean"), tokred.attention(near, near, near, scores="mean"))
    heads, close = t.transpose(1, 2), near.transpose(1, 2)
    assert_same(
        tokred.attention(heads, heads, heads, scores="cls"), tokred.attention(close, close, close, scores="cls")
    )


def rounded(t: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 with the last `bits` bits rounded off: 13 for TF32, 16 for bfloat16."""
    integer = t.contiguous().view(torch.int32)
    return ((integer + (1 << bits - 1)) >> bits << bits).view(torch.float32)


def with_p(q, k, v, size, change) -> tuple:
    p = change(reference.attention_matrix(q, k, size, None))
    return (p @ v).transpose(1, 2).contiguous().transpose(1, 2), p.mean((1, 2))


PLANTED = {
    "logits in TF32": lambda q, k, v, size: reference.attention(rounded(q, 13), k, v, size, scores="mean"),
    "values in TF32": lambda q, k, v, size: reference.attention(q, k, rounded(v, 13), size, scores="mean"),
    "p in bfloat16": lambda q, k, v, size: with_p(q, k, v, size, lambda p: rounded(p, 16)),
    "log size in bfloat16": lambda q, k, v, size: reference.attention(
        q, k, v, rounded(size.log(), 16).exp(), scores="mean"
    ),
    "a key too few": lambda q, k, v, size: with_p(q, k, v, size, lambda p: p * (torch.arange(70) < 69)),
    "a masked key's score": lambda q, k, v, size: with_p(q, k, v, size, lambda p: p.clamp(min=1e-12)),
    "another row's scores": lambda q, k, v, size: (
        reference.attention(q, k, v, size)[0],
        reference.attention(q, k, v, size, scores="cls")[1],
    ),
    "another layout": lambda q, k, v, size: tuple(
        t.contiguous() for t in reference.attention(q, k, v, size, scores="mean")
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_oracle_refuses(planted):
    case = AttentionCase(B=2, N=70, H=3, size_kind="zeros", scores="mean")
    inputs = *case.qkv(), case.size()
    attention_oracle.check(case, *reference.attention(*inputs, **case.keywords))
    with pytest.raises(AssertionError):
        attention_oracle.check(case, *PLANTED[planted](*inputs))
