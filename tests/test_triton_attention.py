"""The Triton attention kernels on the CPU, in the repaired interpreter, over the shared cases against the oracle.

As in test_triton_interpreter.py: uninitialised memory is NaN there, and every call checks that its inputs are
unchanged. The whole table runs on a device, in test_gpu_triton_attention.py.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import ATTENTION_CASES, DIFFERENTIABLE, AttentionCase
from attention_oracle import check, check_gradients, check_scores, expected_gradients
from cases import by_id
from test_triton_interpreter import same
from triton_interpreter import interpreter


def _covering(cases: list[AttentionCase], *fields: str) -> list[AttentionCase]:
    """As few of the cases, in order, as have every value of the fields, once in float32 and once in half precision."""
    seen, kept = set(), []
    for case in cases:
        has = {(field, getattr(case, field), case.dtype == torch.float32) for field in fields}
        has.add((case.trap, case.size_kind if case.trap == "garbage" else "", case.dtype == torch.float32))
        if not has <= seen:
            seen |= has
            kept.append(case)
    return kept


def _one_image(case: AttentionCase) -> AttentionCase:
    """Half the work, unless one image differs in kind from the other."""
    differ = case.layout != "fused" or case.size_kind == "image-masked" or case.trap == "nan-k"
    return replace(case, B=min(case.B, 2 if differ else 1))


# The interpreter takes milliseconds a tile.
SMALL = [_one_image(c) for c in ATTENTION_CASES if c.small and c.B * c.H * c.queries <= 300]
CHEAPEST = sorted(SMALL, key=lambda c: c.B * c.H * c.queries * c.N)
CASES = _covering(SMALL, "size_kind", "scale", "layout", "N", "Nq", "D", "B")
SCORED = _covering([c for c in CHEAPEST if c.scores != "none"], "scores", "scale", "Nq")
TRAINED = _covering([c for c in CHEAPEST if c.trap in DIFFERENTIABLE], "scores", "scale", "layout", "D", "Nq", "B")
# Two or more tiles of everything: one pass with its partial columns, and the loops of float32.
TILED = [
    AttentionCase(B=1, H=2, N=197, Nq=70, D=64, size_kind="zeros", scores="mean", dtype=torch.bfloat16, trap="garbage"),
    AttentionCase(B=1, H=2, N=97, D=64, size_kind="large", scores="cls", dtype=torch.float16),
    AttentionCase(B=1, H=1, N=230, Nq=65, D=64, size_kind="counts", scores="mean", dtype=torch.float16),
    AttentionCase(B=1, H=1, N=70, D=128, size_kind="counts", scores="mean"),
    AttentionCase(B=1, H=1, N=70, D=80, scores="cls", dtype=torch.bfloat16),
]


@pytest.fixture(scope="module")
def triton():
    with interpreter() as call:
        yield call


@by_id(TILED + CASES)
def test_attention(case, triton):
    q, k, v = case.qkv()
    check(case, *triton("attention", q, k, v, case.size(), **case.keywords))


@by_id(TILED + SCORED)
def test_attention_scores(case, triton):
    q, k, _ = case.qkv()
    check_scores(triton("attention_scores", q, k, case.size(), **case.keywords), case)


@by_id(TILED + TRAINED)
def test_attention_backward(case, triton):
    q, k, v = case.qkv()
    out, _ = torch.ops.tokred.attention(q, k, v, case.size(), **case.keywords)
    grads = triton("attention_backward", *case.grads(), q, k, v, out, case.size(), **case.keywords)
    check_gradients(case, grads)


@pytest.mark.parametrize("given", ["out", "scores"])
@pytest.mark.parametrize("scores", ["cls", "mean"])
def test_one_gradient_alone(scores, given, triton):
    case = AttentionCase(B=1, N=40, size_kind="zeros", scores=scores, dtype=torch.bfloat16)
    q, k, v = case.qkv()
    out, _ = torch.ops.tokred.attention(q, k, v, case.size(), **case.keywords)
    of_out, of_scores = case.grads()
    grads = [of_out, None] if given == "out" else [None, of_scores]
    got = triton("attention_backward", *grads, q, k, v, out, case.size(), **case.keywords)
    check_gradients(case, got, with_out=given == "out", with_scores=given == "scores")


def test_no_gradient_is_zero(triton):
    q, k, v = AttentionCase(B=1, N=9).qkv()
    grads = triton("attention_backward", None, None, q, k, v, torch.zeros_like(q), scores="cls")
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_key_of_minus_infinity_leaves_the_others_their_gradients(dtype, triton):
    """Regression of the CPU kernels: lanes without a query were 0, 0 times -inf is NaN, and NaN reached dk and dv."""
    case = AttentionCase(B=1, H=1, N=70, trap="late-mass", scores="mean", dtype=dtype)
    q, k, v = case.qkv()
    out, _ = torch.ops.tokred.attention(q, k, v, scores="mean")
    _, *grads = triton("attention_backward", *case.grads(), q, k, v, out, scores="mean")
    want, bounds = expected_gradients(case, True, True)
    for got, exactly, bound in zip(grads, want[1:], bounds[1:], strict=True):
        assert (got.double() - torch.from_numpy(exactly)).abs().max() <= bound


@pytest.mark.parametrize("offset, stride", [(0, 17), (4, 24)], ids=["odd-rows", "misaligned"])
def test_rows_that_no_vector_load_can_read_are_copied(offset, stride, triton):
    """The kernels take strides in eights of elements."""
    g = torch.Generator().manual_seed(0)
    apart = torch.randn(2 * 2 * 9 * stride + offset, generator=g)[offset:].view(2, 2, 9, stride)[..., :16]
    got = triton("attention", apart, apart, apart, scores="mean")
    want = triton("attention", *[apart.contiguous()] * 3, scores="mean")
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_small_gradients_of_float16_scores_are_kept(triton):
    """p g is 1e-9, nothing in float16."""
    case = AttentionCase(B=1, N=40, scores="mean", dtype=torch.float16)
    q, k, v = case.qkv()
    g = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 1e-4
    dq, _, _ = triton("attention_backward", None, g, q, k, v, torch.zeros_like(q), scores="mean")
    big, _, _ = triton("attention_backward", None, g * 1e4, q, k, v, torch.zeros_like(q), scores="mean")
    assert big.abs().max() > 1e-5
    torch.testing.assert_close(dq.float(), big.float() * 1e-4, rtol=1e-2, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_image_alone_equals_the_batch(dtype, triton):
    case = AttentionCase(N=40, size_kind="counts", scores="mean", dtype=dtype)
    q, k, v, size = *case.qkv(), case.size()
    of_out, of_scores = case.grads()
    out, scores = triton("attention", q, k, v, size, scores="mean")
    grads = triton("attention_backward", of_out, of_scores, q, k, v, out, size, scores="mean")
    for b in range(case.B):
        one = slice(b, b + 1)
        alone = triton("attention", q[one], k[one], v[one], size[one], scores="mean")
        assert same(alone[0], out[one])
        assert same(alone[1], scores[one])
        inputs = of_out[one], of_scores[one], q[one], k[one], v[one], out[one], size[one]
        of_one = triton("attention_backward", *inputs, scores="mean")
        assert all(same(a, whole[one]) for a, whole in zip(of_one, grads, strict=True))


def test_the_kernels_are_what_runs(triton):
    q, k, v = AttentionCase(B=1, N=20, dtype=torch.float16).qkv()
    triton("attention", q, k, v, scores="cls")
    assert list(triton.launched) == ["attention_row_kernel", "scores_kernel"]
    triton("attention", q.float(), k.float(), v.float(), scores="mean")
    assert list(triton.launched) == ["attention_online_kernel", "columns_kernel", "scores_kernel"]
    triton("attention_backward", q, None, q, k, v, q)
    assert list(triton.launched) == ["rows_kernel", "queries_kernel", "keys_kernel"]


@pytest.mark.parametrize("scores", ["cls", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("Nq,N", [(197, 197), (100, 17), (17, 100)])
def test_extra_memory(Nq, N, dtype, scores, triton):
    """4 B H N ceil(min(N, 1024) / 64) + 8 B H Nq bytes at most."""
    case = AttentionCase(B=1, H=1, N=N, Nq=Nq, D=16, dtype=dtype, scores=scores)
    triton("attention", *case.qkv(), scores=scores)
    assert ("attention_row_kernel" in triton.launched) == (dtype == torch.bfloat16)
    extra = {
        t.data_ptr(): t.nbytes
        for tensors in triton.launched.values()
        for name, t in tensors.items()
        if name in ("column_ptr", "row_ptr")
    }
    assert sum(extra.values()) <= 4 * N * -(-min(N, 1024) // 64) + 8 * Nq


def test_float64_is_refused(triton):
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    for op, inputs in (
        ("attention", (q, q, q)),
        ("attention_scores", (q, q)),
        ("attention_backward", (q, None, q, q, q, q)),
    ):
        expected = f"^{op}: q must be float32, float16 or bfloat16 on a CUDA device, got float64"
        with pytest.raises(RuntimeError, match=expected):
            triton(op, *inputs)
