"""Gradients of attention: gradcheck in float64, the table of cases against the float64 oracle, what has none."""

from dataclasses import replace

import attention_oracle
import pytest
import torch
from attention_cases import ATTENTION_CASES, DIFFERENTIABLE, AttentionCase, in_float64
from cases import by_id
from oracle import same
from torch.autograd import gradcheck

import tokred_kernels as tokred
from benchmarks import noise_free
from tokred_kernels import reference

GRADIENT_CASES = [
    c
    for c in ATTENTION_CASES + in_float64([c for c in ATTENTION_CASES if c.N in (33, 50)])
    if c.trap in DIFFERENTIABLE and max(c.N, c.queries) <= 300
]
CASE = AttentionCase(N=40, D=24, size_kind="zeros", scores="mean")


def leaves(case: AttentionCase) -> list[torch.Tensor]:
    return [t.detach().requires_grad_() for t in case.qkv()]


@pytest.mark.parametrize("scores", ["none", "cls", "mean"])
@pytest.mark.parametrize("size_kind", ["none", "zeros"])
@pytest.mark.parametrize("Nq", [None, 3], ids=["self", "cross"])
def test_gradcheck(scores, size_kind, Nq, attention_backend):
    case = AttentionCase(B=1, H=2, N=4, Nq=Nq, D=8, scores=scores, size_kind=size_kind, dtype=torch.float64)
    q, k, v, size = *leaves(case), case.size()

    def attention(q, k, v):  # gradcheck sends back one output's gradient at a time, None for the other
        return tokred.attention(q, k, v, size, **case.keywords)[: 1 if scores == "none" else 2]

    assert gradcheck(attention, (q, k, v))


@by_id(GRADIENT_CASES)
def test_gradients(case, attention_backend, poisoned):
    q, k, v = leaves(case)
    results = tokred.attention(q, k, v, case.size(), **case.keywords)
    given = case.grads()
    grads = torch.autograd.grad(results, (q, k, v), given)
    attention_oracle.check_gradients(case, grads)
    for t, before in zip((q, k, v, *given), (*case.qkv(), *case.grads()), strict=True):
        assert same(t.detach(), before)


@pytest.mark.parametrize("with_out, with_scores", [(True, False), (False, True), (False, False)])
@by_id([c for c in GRADIENT_CASES if c.N == 70 and c.trap == "normal" and c.size_kind in ("zeros", "image-masked")])
def test_a_gradient_of_none_is_zero(case, with_out, with_scores, attention_backend, poisoned):
    q, k, v, size = *case.qkv(), case.size()
    out, _ = tokred.attention(q, k, v, size, **case.keywords)
    grad_out, grad_scores = case.grads()
    grads = torch.ops.tokred.attention_backward(
        grad_out if with_out else None, grad_scores if with_scores else None, q, k, v, out, size, **case.keywords
    )
    attention_oracle.check_gradients(case, grads, with_out, with_scores)


def test_only_what_is_asked_for_gets_a_gradient(attention_backend):
    q, k, v = CASE.qkv()
    size = CASE.size().requires_grad_()
    q = q.detach().requires_grad_()
    out, scores = tokred.attention(q, k, v, size, **CASE.keywords)
    assert out.requires_grad and scores.requires_grad
    (out.sum() + scores.square().sum()).backward()
    assert q.grad is not None and k.grad is None and v.grad is None and size.grad is None
    q, k, v = leaves(CASE)
    assert not tokred.attention_scores(q, k, CASE.size(), scores="mean").requires_grad


def test_scores_that_were_not_emitted_send_no_gradient_back(attention_backend):
    q, k, v = leaves(CASE)
    _, scores = tokred.attention(q, k, v, scores="none")
    assert torch.autograd.grad(scores.sum(), (q, k, v), allow_unused=True) == (None, None, None)


@by_id([CASE, AttentionCase(N=70, scores="cls", dtype=torch.bfloat16)])
def test_gradients_come_in_any_strides(case, attention_backend):
    q, k, v = leaves(case)
    out, scores = tokred.attention(q, k, v, case.size(), **case.keywords)
    grad_out, grad_scores = case.grads()

    def gradients(grad_out, grad_scores):
        return torch.autograd.grad((out, scores), (q, k, v), (grad_out, grad_scores), retain_graph=True)

    want = gradients(grad_out, grad_scores)
    strided = torch.stack([grad_out, torch.full_like(grad_out, torch.nan)], -1)[..., 0]
    doubled = torch.stack([grad_scores, torch.full_like(grad_scores, torch.nan)], -1)[..., 0]
    for other in (gradients(grad_out.contiguous(), grad_scores), gradients(strided, doubled)):
        assert all(same(a, b) for a, b in zip(other, want, strict=True))
    one = torch.ones_like(grad_out), torch.ones_like(grad_scores)
    expanded = gradients(one[0][:1, :1, :1, :1].expand_as(one[0]), one[1][:1, :1].expand_as(one[1]))
    assert all(same(a, b) for a, b in zip(expanded, gradients(*one), strict=True))


def test_second_order_raises(attention_backend):
    q, k, v = leaves(CASE)
    for result in tokred.attention(q, k, v, CASE.size(), **CASE.keywords):
        (grad,) = torch.autograd.grad(result.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@by_id([AttentionCase(B=1, H=1, N=1024, D=16, scores=s, size_kind="counts") for s in ("cls", "mean")])
def test_the_backward_allocates_no_attention_matrix(case, attention_backend):
    if attention_backend == "reference":
        pytest.skip("the reference is the definition, with the matrix")
    q, k, v, size = *case.qkv(), case.size()
    out, _ = tokred.attention(q, k, v, size, **case.keywords)
    given = *case.grads(), q, k, v, out, size

    def backward():
        return torch.ops.tokred.attention_backward(*given, **case.keywords)

    matrix = 4 * case.N**2
    assert noise_free.allocated_bytes(backward) - noise_free.nbytes(backward()) <= matrix / 8


@by_id([AttentionCase(B=2, H=2, N=197, D=64, size_kind="counts", scores="mean", dtype=d) for d in (torch.float32,)])
def test_bitwise_equal_over_threads_and_runs(case, attention_backend):
    if attention_backend == "reference":
        pytest.skip("the reference's bits are those of PyTorch's matrix product")
    q, k, v, size = *case.qkv(), case.size()
    out, _ = tokred.attention(q, k, v, size, **case.keywords)
    given = *case.grads(), q, k, v, out, size
    assert noise_free.bitwise_equal(
        lambda: torch.ops.tokred.attention_backward(*given, **case.keywords), threads=(1, 2, 5), runs=2
    )


def test_a_row_without_mass_sends_nothing_back(attention_backend):
    case = AttentionCase(size_kind="masked", scores="mean")
    q, k, v = leaves(case)
    results = tokred.attention(q, k, v, case.size(), **case.keywords)
    assert not any(g.any() for g in torch.autograd.grad(results, (q, k, v), case.grads()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_key_of_minus_infinity_leaves_the_others_their_gradients(dtype, attention_backend):
    """Regression: a tile's lanes without a query are 0 there, 0 times -inf is NaN, and NaN reached dk and dv."""
    case = AttentionCase(N=70, trap="late-mass", scores="mean", dtype=dtype)
    q, k, v = leaves(case)
    results = tokred.attention(q, k, v, **case.keywords)
    _, *grads = torch.autograd.grad(results, (q, k, v), case.grads())
    want, bounds = attention_oracle.expected_gradients(case, True, True)
    for got, exactly, bound in zip(grads, want[1:], bounds[1:], strict=True):
        assert (got.double() - torch.from_numpy(exactly)).abs().max() <= bound


def test_training_through_the_scores_lowers_the_loss(attention_backend):
    """EViT learns where to look from the scores alone: one step down the gradient raises the chosen key's share."""
    q, k, v = leaves(AttentionCase(B=1, N=20, dtype=torch.float64))
    for scores in ("cls", "mean"):
        share = tokred.attention(q, k, v, scores=scores)[1][0, 7]
        dq, dk, dv = torch.autograd.grad(share, (q, k, v))
        assert not dv.any()
        assert tokred.attention(q + 0.1 * dq, k + 0.1 * dk, v, scores=scores)[1][0, 7] > share


def backward(case: AttentionCase, of_scores: float = 1, of_out: float = 1, **changed) -> list[torch.Tensor]:
    """The reference's gradients from case.grads() times `of_scores` and `of_out`, with changed keywords."""
    q, k, v, size = *case.qkv(), case.size()
    grad_out, grad_scores = case.grads()
    keywords = {**case.keywords, **changed}
    forward, _ = reference.attention(q, k, v, size, **keywords)
    return list(
        reference.attention_backward(of_out * grad_out, of_scores * grad_scores, q, k, v, forward, size, **keywords)
    )


PLANTED = {
    "no gradient of the scores": lambda case: backward(case, of_scores=0),
    "a head counted twice": lambda case: backward(case, of_scores=1 + 1 / case.H),
    "another mode": lambda case: backward(case, scores="mean" if case.scores == "cls" else "cls"),
    "no gradient of out": lambda case: backward(case, of_out=0),
    "a forgotten scale": lambda case: [backward(case)[0] * case.D**0.5, *backward(case)[1:]],
    "bfloat16": lambda case: [t.bfloat16().float() for t in backward(case)],
}


@pytest.mark.parametrize("scores", ["cls", "mean"])
@pytest.mark.parametrize("planted", PLANTED)
def test_the_oracle_refuses(planted, scores):
    case = replace(CASE, scores=scores)
    attention_oracle.check_gradients(case, backward(case))
    with pytest.raises(AssertionError):
        attention_oracle.check_gradients(case, PLANTED[planted](case))
