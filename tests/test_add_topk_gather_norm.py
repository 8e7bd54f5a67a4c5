"""add_topk_gather_norm: bit for bit the two steps before its norm, and the norm against float64."""

import itertools

import pytest
import torch
from norm_oracle import EPS, affine, branch_of, check_norm, check_rows, check_steps, scaled
from oracle import same
from topk_cases import FUSE, TOPK_CASES, TopkCase, with_float64
from torch._subclasses.fake_tensor import FakeTensorMode
from vits import images, tiny

import tokred_kernels as tokred
from tokred_kernels import reference

op = torch.ops.tokred.add_topk_gather_norm


def inputs(case: TopkCase, is_affine: bool = True):
    x = case.x()
    weight, bias = affine(case.C) if is_affine else (None, None)
    return x, branch_of(x), case.score(), case.k, weight, bias, case.p


MODES = list(zip(with_float64(TOPK_CASES), itertools.cycle(FUSE)))  # the table is long: one mode a case


@pytest.mark.parametrize("case, fuse", MODES, ids=lambda c: getattr(c, "id", c))
def test_equals_the_steps(case, fuse, backend, poisoned):
    given = x, branch, score, k, weight, bias, p = inputs(case)
    before = [t.clone() for t in (x, branch, score)]
    out, assign, normed = op(*given, fuse=fuse, eps=EPS)
    check_steps((out, assign), tokred.topk_gather(x + branch, score, k, p, fuse=fuse))
    check_norm(normed, out, weight, bias)
    assert all(same(t, kept) for t, kept in zip((x, branch, score), before, strict=True))


@pytest.mark.parametrize("given", ["both", "scale", "bias"])
@pytest.mark.parametrize(
    "case",
    [c for c in TOPK_CASES if c.trap in ("random", "ties") and c.score_dtype == torch.float32],
    ids=lambda c: c.id,
)
def test_a_branch_with_scale_and_bias(case, given, backend, poisoned):
    x, branch, score, k, *norm, p = inputs(case)
    scale, bias = scaled(case.C, torch.float32, case.dtype)
    scale, bias = None if given == "bias" else scale, None if given == "scale" else bias
    fuse = FUSE[case.C % 3]
    out, assign, normed = op(x, branch, score, k, *norm, p, scale, bias, fuse=fuse, eps=EPS)
    want = reference.topk_gather(x, score, k, p, fuse=fuse)[1]
    assert torch.equal(assign, want)
    check_rows(out, lambda y: reference.topk_gather(y, score, k, p, fuse=fuse)[0], x, branch, scale, bias)
    check_norm(normed, out, *norm)


@pytest.mark.parametrize("fuse", FUSE)
def test_without_weights_and_by_the_reference(fuse):
    for case in (TopkCase(trap="ties"), TopkCase(trap="cancel", dtype=torch.bfloat16), TopkCase(k=48)):
        for is_affine in (True, False):
            given = inputs(case, is_affine)
            for a, b in zip(op(*given, fuse=fuse), reference.add_topk_gather_norm(*given, fuse=fuse), strict=True):
                torch.testing.assert_close(a, b)


def test_images_and_threads_do_not_matter():
    x, branch, score, k, *norm, p = inputs(TopkCase(B=3, trap="ties"))
    whole = op(x, branch, score, k, *norm, p, fuse="mean")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    again = op(x, branch, score, k, *norm, p, fuse="mean")
    torch.set_num_threads(threads)
    for b in range(len(x)):
        alone = op(*(t[b : b + 1] for t in (x, branch, score)), k, *norm, p, fuse="mean")
        assert all(same(a[b : b + 1], c) and same(a, d) for a, c, d in zip(whole, alone, again, strict=True))


def small(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(2, 9, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    score = torch.rand(2, 9, generator=g, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.randn(5, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    return x, branch, score, 4, weight, bias, 2


@pytest.mark.parametrize("fuse", FUSE)
@pytest.mark.parametrize("outputs", [(0,), (2,), (0, 2)])
def test_gradients(outputs, fuse):
    x, branch, score, k, weight, bias, p = small()

    def run(x, branch, score, weight, bias):
        results = op(x, branch, score, k, weight, bias, p, fuse=fuse, eps=1e-3)
        return tuple(results[i] for i in outputs)

    leaves = (x, branch, score, weight, bias)
    grads = torch.autograd.grad(sum(t.sum() for t in run(*leaves)), leaves, allow_unused=True)
    reached = [True, True, fuse != "none", 2 in outputs, 2 in outputs]
    assert [g is not None for g in grads] == reached
    frozen = [leaf if there else leaf.detach() for leaf, there in zip(leaves, reached, strict=True)]
    assert torch.autograd.gradcheck(run, frozen)


@pytest.mark.parametrize("fuse", FUSE)
def test_gradients_of_scale_and_bias(fuse):
    x, branch, score, k, *norm, p = small()
    scale, bias = (t.requires_grad_() for t in scaled(5, torch.float64, torch.float64))

    def run(x, branch, score, scale, bias):
        out, _, normed = op(x, branch, score, k, *norm, p, scale, bias, fuse=fuse, eps=1e-3)
        return out, normed

    score = score if fuse != "none" else score.detach()
    assert torch.autograd.gradcheck(run, (x, branch, score, scale, bias))
    out, normed = run(x.detach(), branch.detach(), score.detach(), scale, bias.detach())
    assert torch.autograd.grad(out.sum() + normed.sum(), scale)[0].shape == (5,)


def test_frozen_weights_get_no_gradient():
    x, branch, score, k, weight, bias, p = small()
    x, branch, score, weight = x.detach(), branch.detach(), score.detach(), weight.detach()
    out, _, normed = op(x, branch, score, k, weight, bias, p, fuse="mean")
    (grad,) = torch.autograd.grad(normed.sum() + out.sum(), bias)
    torch.testing.assert_close(grad, torch.full_like(bias, 14.0))  # rows of both images
    out = op(x, branch.requires_grad_(), score, k, weight, None, p, fuse="mean")[0]
    (grad,) = torch.autograd.grad(out.sum(), branch)
    torch.testing.assert_close(grad.sum((1, 2)), torch.full((2,), 35.0).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_and_fake(dtype):
    args = small(dtype)
    torch.library.opcheck(op.default, args, {"fuse": "mean"})
    rows = (t.requires_grad_() for t in scaled(5, torch.float64, torch.float64))
    torch.library.opcheck(op.default, (*args, *rows), {"fuse": "mean"})
    for k in (0, 4, 9):
        args = (*args[:3], k, *args[4:])
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args), fuse="sum")
        for a, b in zip(op(*args, fuse="sum"), fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_vmap():
    x, branch, score, k, weight, bias, p = (t.detach() if isinstance(t, torch.Tensor) else t for t in small())
    xs = torch.stack([x, 2 * x])
    got = torch.vmap(lambda x: op(x, branch, score, k, weight, bias, p, fuse="sum"))(xs)
    for i, each in enumerate(xs):
        for a, b in zip(got, op(each, branch, score, k, weight, bias, p, fuse="sum"), strict=True):
            assert torch.equal(a[i], b)
    with pytest.raises(NotImplementedError, match="norm_bias, branch_scale or branch_bias; map topk_gather and"):
        torch.vmap(lambda w: op(x, branch, score, k, w, bias, p))(torch.stack([weight, weight]))


def test_layer_scale_is_a_part_of_it():
    model = tokred.apply(tiny("deit3"), "evit", keep_rate=0.6, stages=(1, 2))
    with torch.inference_mode(), torch.profiler.profile(acc_events=True) as profile:
        got = model(images())
    names = [event.name for event in profile.events()]
    assert names.count("tokred::add_topk_gather_norm") == 2
    torch.testing.assert_close(got, model(images()))  # with gradients: its steps


@pytest.mark.parametrize("method", ["topk", "evit", "metr"])
def test_a_model_calls_it_in_inference_alone_and_says_the_same(method):
    model = tokred.apply(tiny("deit"), method, keep_rate=0.6, stages=(1, 2))
    seen = []
    for context in (torch.inference_mode, torch.enable_grad):
        with context(), torch.profiler.profile(acc_events=True) as profile:
            seen.append(model(images()))
        calls = sum(event.name == "tokred::add_topk_gather_norm" for event in profile.events())
        assert calls == (2 if context is torch.inference_mode else 0)
    torch.testing.assert_close(*seen)
