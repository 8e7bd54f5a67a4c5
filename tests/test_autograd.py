"""Gradients of the ops: gradcheck in float64, the formulas against autograd through plain PyTorch, what has none."""

import pytest
import torch
from torch.autograd import gradcheck

import tokred_kernels as tokred
from benchmarks.noise_free import saved_shapes

REDUCE = ("mean", "sum", "amax")


def inputs(seed: int = 0, N: int = 9, M: int = 4, C: int = 3, dtype=torch.float64):
    """x, an assignment with a dropped token, an empty row and a single member, size, weight."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, N, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    assign = torch.randint(0, M - 1, (2, N), generator=g, dtype=torch.int32)
    assign[assign == 0] = 1  # row 0 is empty
    assign[:, 4], assign[:, 6] = -1, 3  # one dropped, row 3 has a single member
    assign[:, 5] = 0 if M > 4 else assign[:, 5]
    size = torch.randint(1, 5, (2, N), generator=g).to(dtype)
    weight = (torch.rand(2, N, generator=g, dtype=torch.float64) + 0.5).to(dtype).requires_grad_()
    return x, assign, size, weight


def plain_merge(x, assign, m, size, weight, reduce):
    """The definition in differentiable PyTorch: a one-hot matrix, no kernels."""
    member = torch.nn.functional.one_hot(assign.long().clamp(min=-1) + 1, m + 1)[..., 1:].to(x.dtype)  # [B, N, m]
    if reduce == "amax":
        spread = torch.where(member[..., None] > 0, x[:, :, None], -torch.inf)
        return torch.where(member.sum(1)[..., None] > 0, spread.amax(1), 0)
    w = (
        weight
        if weight is not None
        else (size if size is not None and reduce == "mean" else torch.ones_like(x[..., 0]))
    )
    total = torch.einsum("bnm,bnc->bmc", member * w[..., None], x)
    if reduce == "sum":
        return total
    mass = (member * w[..., None]).sum(1)[..., None]
    return torch.where(mass == 0, 0, total / torch.where(mass == 0, 1, mass))


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_merge(reduce, sized, weighted):
    x, assign, size, weight = inputs()
    size, weight = size if sized else None, weight if weighted else None
    leaves = [t for t in (x, weight if reduce != "amax" else None) if t is not None]
    assert gradcheck(lambda *_: tokred.merge(x, assign, 4, size, weight, reduce=reduce)[0], leaves)
    seed = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(tokred.merge(x, assign, 4, size, weight, reduce=reduce)[0], leaves, seed)
    want = torch.autograd.grad(plain_merge(x, assign, 4, size, weight, reduce), leaves, seed)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_unmerge():
    assign = torch.tensor([[0, 2, -1, 2, 5, 1], [1, 1, 1, 1, -7, 0]], dtype=torch.int32)
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(tokred.unmerge, (y, assign))


@pytest.mark.parametrize("sized", [False, True])
def test_match_merge(sized):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 3, dtype=torch.float64, generator=g, requires_grad=True)
    k = torch.randn(2, 2, 12, 5, dtype=torch.float64, generator=g)
    size = torch.randint(1, 5, (2, 12), generator=g).double() if sized else None
    assert gradcheck(lambda x: tokred.match_merge(x, k, 4, 1, size)[0], (x,))


def test_no_gradient_through_the_matching_or_sizes():
    x = torch.randn(2, 12, 3, requires_grad=True)
    k = torch.randn(2, 2, 12, 5, requires_grad=True)
    size = torch.ones(2, 12, requires_grad=True)
    out, size_out, assign = tokred.match_merge(x, k, 4, 1, size)
    assert out.requires_grad and not size_out.requires_grad and not assign.requires_grad
    out.sum().backward()
    assert k.grad is None and size.grad is None and x.grad is not None
    assert not tokred.match(k, 3).requires_grad


@pytest.mark.parametrize("reduce", REDUCE)
def test_weights_of_zero_fall_back_to_the_plain_mean_with_finite_gradients(reduce):
    x, assign, _, _ = inputs()
    weight = torch.zeros(2, 9, dtype=torch.float64, requires_grad=True)
    out, _ = tokred.merge(x, assign, 4, None, weight, reduce=reduce)
    grads = torch.autograd.grad(out.sum(), (x, weight), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    if reduce == "mean":  # each row's gradient is shared equally, so a row with members hands out 1 a channel
        kept = assign.ge(0)
        rows = torch.zeros(2, 4, dtype=torch.float64).scatter_add(
            1, assign.clamp(min=0).long(), grads[0][..., 0] * kept
        )
        assert torch.allclose(rows[:, 1:][rows[:, 1:] > 0], torch.ones(()).double())
        assert (grads[0][assign < 0] == 0).all()


def test_equal_maxima_share_the_gradient():
    x = torch.zeros(1, 4, 1, dtype=torch.float64, requires_grad=True)
    assign = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32)
    (grad,) = torch.autograd.grad(tokred.merge(x, assign, 2, reduce="amax")[0].sum(), x)
    torch.testing.assert_close(grad[0, :, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 1], dtype=torch.float64))


def test_second_order_raises():
    x, assign, size, _ = inputs()
    for op in (
        lambda: tokred.merge(x, assign, 4, size)[0],
        lambda: tokred.unmerge(x, assign % 4),
        lambda: tokred.match_merge(x, x.detach(), 2)[0],
    ):
        (grad,) = torch.autograd.grad((op() ** 2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_features_are_kept_for_the_gradient_of_weights_alone():
    x, assign, size, weight = inputs()
    for reduce in ("mean", "sum"):
        kept = saved_shapes(lambda reduce=reduce: tokred.merge(x, assign, 4, size, weight.detach(), reduce=reduce))
        assert kept == {(2, 9)}
        kept = saved_shapes(lambda reduce=reduce: tokred.merge(x, assign, 4, size, weight, reduce=reduce))
        assert kept == {(2, 9), (2, 9, 3), (2, 4, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_input(dtype):
    x, assign, size, weight = inputs(dtype=dtype)
    weight = weight.detach().float().requires_grad_()
    out, _ = tokred.merge(x, assign, 4, size.float(), weight)
    gx, gw = torch.autograd.grad(out.float().square().sum(), (x, weight))
    assert gx.dtype == dtype and gw.dtype == torch.float32
    assert gx.isfinite().all() and gw.isfinite().all()


def test_dropped_tokens_get_no_gradient():
    x, assign, size, weight = inputs()
    for reduce in REDUCE:
        (grad,) = torch.autograd.grad(tokred.merge(x, assign, 4, size, weight, reduce=reduce)[0].sum(), x)
        assert (grad[assign < 0] == 0).all()
    size[assign < 0] = torch.nan
    (grad,) = torch.autograd.grad(tokred.merge(x, assign, 4, size)[0].sum(), x)
    assert (grad[assign < 0] == 0).all() and grad.isfinite().all()
