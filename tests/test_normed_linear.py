"""A product of normalised tokens in training: gradients of the plain form, without what that keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, RmsNorm
from torch import nn

from benchmarks.noise_free import saved_shapes
from tokred_kernels.models._norm import normed_linear


def parts(norm=LayerNorm, dtype=torch.float64, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    norm = norm(6, **options)
    for p in norm.parameters():
        p.data = torch.randn(p.shape, generator=g)
    linear = nn.Linear(6, 5)
    linear.weight.data, linear.bias.data = (torch.randn(t.shape, generator=g) for t in (linear.weight, linear.bias))
    x = (3 * torch.randn(2, 7, 6, generator=g) + 1).to(dtype).requires_grad_()
    return norm.to(dtype), linear.to(dtype), x


def grads(product, norm, linear, x, seed=1):
    leaves = [t for t in (x, *norm.parameters(), *linear.parameters()) if t.requires_grad]
    out = product(norm, x, linear.weight, linear.bias)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def plain(norm, x, weight, bias):
    return F.linear(norm(x), weight, bias)


@pytest.mark.parametrize("options", [{}, dict(affine=False), dict(bias=False)])
def test_gradients_of_the_plain_form(options):
    norm, linear, x = parts(**options)
    torch.testing.assert_close(grads(normed_linear, norm, linear, x), grads(plain, norm, linear, x))
    assert torch.autograd.gradcheck(lambda x, w, b: normed_linear(norm, x, w, b), (x, linear.weight, linear.bias))


@pytest.mark.parametrize("frozen", ["x", "norm", "weight", "bias"])
def test_what_is_frozen_has_no_gradient(frozen):
    norm, linear, x = parts()
    for t in {"x": [x], "norm": norm.parameters(), "weight": [linear.weight], "bias": [linear.bias]}[frozen]:
        t.requires_grad_(False)
    torch.testing.assert_close(grads(normed_linear, norm, linear, x), grads(plain, norm, linear, x))


def test_a_product_without_bias():
    norm, linear, x = parts()
    linear.register_parameter("bias", None)
    torch.testing.assert_close(grads(normed_linear, norm, linear, x), grads(plain, norm, linear, x))


def test_autocast_gives_the_gradients_and_dtypes_of_the_plain_form():
    norm, linear, x = parts(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = grads(normed_linear, norm, linear, x), grads(plain, norm, linear, x)
    assert got[0].dtype == torch.bfloat16 and {t.dtype for t in got[1:]} == {torch.float32}
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_second_order_and_per_sample_gradients():
    norm, linear, x = parts()
    assert torch.autograd.gradgradcheck(lambda x, w: normed_linear(norm, x, w, linear.bias), (x, linear.weight))

    def loss(weight, x, product):
        return product(norm, x, weight, linear.bias).square().sum()

    got, want = (
        torch.func.vmap(torch.func.grad(loss), (None, 0, None))(linear.weight.detach(), x.detach(), product)
        for product in (normed_linear, plain)
    )
    torch.testing.assert_close(got, want)


def test_training_keeps_the_tokens_once():
    norm, linear, x = parts()
    x = x.clone()  # not a leaf: what a block gives
    kept = saved_shapes(lambda: normed_linear(norm, x, linear.weight, linear.bias))
    assert kept == {(2, 7, 6), (6,), (5, 6)}  # x, norm, weight
    assert (14, 6) in saved_shapes(lambda: plain(norm, x, linear.weight, linear.bias))  # norm(x) beside x


def test_other_norms_and_watched_ones_run_their_own_forward():
    _, linear, x = parts()
    norm = RmsNorm(6).double()
    torch.testing.assert_close(grads(normed_linear, norm, linear, x), grads(plain, norm, linear, x))
    watched = copy.deepcopy(parts()[0])
    seen = []
    watched.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    normed_linear(watched, x, linear.weight, linear.bias).sum().backward()
    assert seen == [x.shape]
