"""Losses of training against hand-worked numbers and against float64 autograd of their plain formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from torch import nn
from vits import images, tiny

import tokred_kernels as tokred
from tokred_kernels import training

LN3 = math.log(3)
CE = nn.CrossEntropyLoss()


def near(got, want):
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_distillation_worked():
    """softmax of (0, ln 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2); at tau 2 the logits are (0, 2 ln 3)."""
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    near(training.distillation(torch.zeros(2, 2), torch.tensor([[0, LN3], [LN3, 0]])), kl)
    near(training.distillation(torch.zeros(1, 2), torch.tensor([[0, 2 * LN3]]), tau=2.0), 4 * kl)


def test_multi_exit_worked():
    """Cross entropies -ln 3/4 and -ln 1/2; one KL as above, and one of equals."""
    sure, unsure = torch.tensor([[0, LN3]]), torch.zeros(1, 2)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    want = math.log(4 / 3) + 0.15 * (math.log(2) + math.log(4 / 3)) + 0.15 * kl
    near(training.multi_exit(CE, (sure, {3: unsure, 6: sure}), torch.tensor([1])), want)
    want = math.log(4 / 3) + 0.5 * math.log(2) + 0.25 * kl
    got = training.multi_exit(CE, (sure, {3: unsure}), torch.tensor([1]), exit_weight=0.5, distill_weight=0.25)
    near(got, want)


def test_consistency_worked():
    """The first image is right with 3/4 and counts, (1 + 9) / 2 = 5; the second is right with 1/4 and does not."""
    logits = torch.tensor([[0, LN3], [0, LN3]])
    token, other = torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [7.0, 7.0]])
    target = torch.tensor([1, 0])
    ce = (math.log(4 / 3) + math.log(4)) / 2
    near(training.consistency(CE, ((logits, token), (logits, other)), target), 2 * ce + 3 * 5)
    near(training.consistency(CE, ((logits, token), (logits, other)), target, threshold=0.76), 2 * ce)
    # Mixed of both classes, an image is sure of their sum: (5 + 49) / 2.
    mixed = torch.tensor([[0.05, 0.7, 0.25], [0.6, 0.35, 0.05]])
    logits = torch.tensor([[-50, 0, LN3], [0, LN3, -50]])
    near(
        training.consistency(nn.MSELoss(), ((logits, token), (logits, other)), mixed, weight=1.0)
        - 2 * F.mse_loss(logits, mixed),
        27,
    )


def test_policy_worked():
    """Stages keep 3/4 and 1/4 where 1/2 and 1/4 are asked: a ratio loss of 1/32; the one patch kept is (1, 3) away."""
    logits = torch.tensor([[0, LN3]])
    keep = {1: torch.tensor([[1.0, 1, 1, 0]]), 3: torch.tensor([[0.0, 1, 0, 0]])}
    patches = torch.zeros(1, 4, 2)
    others = torch.tensor([[[9.0, 9], [1, 3], [9, 9], [9, 9]]])
    got = training.policy(CE, (logits, keep, patches), torch.tensor([1]), (logits, others), (0.5, 0.25))
    near(got, math.log(4 / 3) + 2 / 32 + 0.5 * 5)
    keep[3] = torch.zeros(1, 4)
    got = training.policy(CE, (logits, keep, patches), torch.tensor([1]), (logits, others), (0.5, 0.25))
    near(got, math.log(4 / 3) + 2 * (1 / 16 + 1 / 16) / 2)
    with pytest.raises(ValueError, match=r"policy: rates must have one entry a stage, 2, got \[0.7\]"):
        training.policy(CE, (logits, keep, patches), torch.tensor([1]), (logits, others), [0.7])


def plain_kl(logits, teacher, tau):
    total = 0
    for own, other in zip(logits / tau, teacher / tau, strict=True):
        p, q = other.exp() / other.exp().sum(), own.exp() / own.exp().sum()
        total = total + tau**2 * (p * (p / q).log()).sum()
    return total / len(logits)


def plain_ce(logits, target):
    return -torch.stack([(y.exp() / y.exp().sum()).log()[t] for y, t in zip(logits, target, strict=True)]).mean()


def plain_multi_exit(x, target):
    logits, *exits = x[:3]
    early = sum(0.2 * plain_ce(e, target) + 0.3 * plain_kl(e, logits.detach(), 2.0) for e in exits)
    return plain_ce(logits, target) + early


def plain_consistency(x, target):
    total = plain_ce(x[0], target) + plain_ce(x[1], target)
    apart = [
        (x[3][b].detach() - x[2][b]).square().mean()
        for b in range(len(target))
        if (x[0][b].exp() / x[0][b].exp().sum())[target[b]] > 0.15
    ]
    assert 0 < len(apart) < len(target)
    return total + 3 * sum(apart) / len(apart)


def plain_policy(x, target):
    keep = [x[2].sigmoid(), (x[3] > 0).double() * x[3] / x[3].detach()]
    ratio = sum((k.mean(1) - rate).square().mean() for k, rate in zip(keep, (0.5, 0.25), strict=True)) / 2
    kept = [(b, p) for b in range(x[3].shape[0]) for p in range(x[3].shape[1]) if x[3][b, p] > 0]
    apart = sum((x[4][b, p] - x[5][b, p].detach()).square().mean() for b, p in kept) / len(kept)
    return plain_ce(x[0], target) + 2 * ratio + 0.5 * plain_kl(x[0], x[1].detach(), 1.0) + 0.5 * apart


def ours_multi_exit(x, target):
    output = x[0], {3: x[1], 6: x[2]}
    return training.multi_exit(CE, output, target, exit_weight=0.2, distill_weight=0.3, tau=2.0)


def ours_consistency(x, target):
    return training.consistency(CE, ((x[0], x[2]), (x[1], x[3])), target, threshold=0.15)


def ours_policy(x, target):
    keep = {1: x[2].sigmoid(), 3: (x[3] > 0).to(x[3].dtype) * x[3] / x[3].detach()}
    return training.policy(CE, (x[0], keep, x[4]), target, (x[1], x[5]), (0.5, 0.25))


LOSSES = {
    "multi_exit": (ours_multi_exit, plain_multi_exit, [(6, 5)] * 3),
    "consistency": (ours_consistency, plain_consistency, [(6, 5), (6, 5), (6, 8), (6, 8)]),
    "policy": (ours_policy, plain_policy, [(6, 5), (6, 5), (6, 9), (6, 9), (6, 9, 8), (6, 9, 8)]),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_plain_formula(name, dtype):
    ours, plain, shapes = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, (6,), generator=generator)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    own = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    loss, want = ours(own, target), plain(exact, target)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    got = torch.autograd.grad(loss, own, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(want, exact, allow_unused=True), strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("exit_at", ["post_block", "post_attn"])
@pytest.mark.parametrize("method", [None, "metr"])
def test_exits_train_the_same_under_checkpointing(method, exit_at):
    torch.manual_seed(0)
    model = tokred.add_exits(tiny("deit"), (1, 2)).train()
    if method:
        tokred.apply(model, method, keep_rate=0.7, stages=(1, 2))
    target = torch.tensor([1, 4])
    grads = []
    for checkpointing in (False, True):
        other = copy.deepcopy(model)
        other.set_grad_checkpointing(checkpointing)
        training.multi_exit(CE, tokred.exit_logits(other, images(), exit_at=exit_at), target).backward()
        grads.append([p.grad for p in other.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_exits_train_under_reentrant_checkpointing_or_say_that_they_cannot():
    model = tokred.add_exits(tiny("deit"), (1,)).train()
    model.set_grad_checkpointing()
    set_reentrant_ckpt(True)
    try:
        _, exits = tokred.exit_logits(model, images())
        assert exits[1].requires_grad
        with pytest.raises(ValueError, match="exit_logits: post_attn has no gradients under reentrant checkpointing"):
            tokred.exit_logits(model, images(), exit_at="post_attn")
    finally:
        set_reentrant_ckpt(False)


def test_added_exits_start_as_torch_starts_layers_and_leave_without_a_trace():
    model = tiny("deit")
    names = list(model.state_dict())
    torch.manual_seed(3)
    assert tokred.add_exits(model, (2, 1)) is model
    torch.manual_seed(3)
    want = nn.ModuleDict(
        {str(i): nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 7)) for i in (1, 2)}
    )
    got = model.tokred_exits.state_dict()
    assert list(got) == list(want.state_dict())
    # The same numbers, drawn when an exit is reset instead of when it is built: layer by layer, in the same order.
    assert all(torch.equal(got[name], t) for name, t in want.state_dict().items())
    assert tokred.remove_exits(model) is model and list(model.state_dict()) == names
    assert tokred.remove_exits(model) is model


def test_what_has_no_exits_is_refused():
    with pytest.raises(ValueError, match=r"add_exits: blocks must be below 4, got \(3, 6, 9\)"):
        tokred.add_exits(tiny("deit"))
    with pytest.raises(ValueError, match="add_exits: the model has no class token"):
        tokred.add_exits(tiny("gap"), (1,))
    with pytest.raises(ValueError, match="add_exits: the model has no classifier"):
        tokred.add_exits(tiny("no-head"), (1,))


def test_two_passes_are_two_models():
    model = tokred.apply(tiny("deit"), "mctf", r=5).train()
    other = tokred.apply(tiny("deit"), "mctf", r=2).train()
    (student, z), (teacher, y) = tokred.two_passes(model, images(), r=2)
    assert torch.equal(student, model(images())) and torch.equal(teacher, other(images()))
    assert torch.equal(z, model.forward_features(images())[:, 0])
    assert torch.equal(y, other.forward_features(images())[:, 0])
    dense = tokred.two_passes(model, images(), r=0)[1]
    assert torch.equal(dense[0], tiny("deit")(images())) and model.tokred_method.r == 5
    training.consistency(CE, tokred.two_passes(model, images(), r=1), torch.tensor([0, 3])).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match='two_passes: the model is not patched with "mctf"'):
        tokred.two_passes(tiny("deit"), images(), r=1)
    with pytest.raises(ValueError, match="two_passes: the model has no class token to compare"):
        tokred.two_passes(tokred.apply(tiny("gap"), "mctf", r=5), images(), r=1)


def test_policy_trains_the_predictors():
    dense = tiny("deit")
    model = tokred.apply(copy.deepcopy(dense), "dynamicvit", keep_rate=0.7, stages=(1, 3)).train()
    torch.manual_seed(0)
    teacher = training.teacher(dense, images())
    training.policy(CE, tokred.policy_logits(model, images()), torch.tensor([0, 3]), teacher, (0.7, 0.49)).backward()
    assert all(p.grad is None for p in dense.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[1].tokred_part.out_conv[4].weight.grad.abs().max() > 0


def test_warm_up_worked():
    """From 1 to 0.7 in 90 steps from step 10: 3/4, 1/2, 1/4 of the way after 30, 45, 60."""
    rates = [training.warm_up(step, 0.7, begin=10, steps=90) for step in (0, 9, 10, 40, 55, 70, 100, 5000)]
    assert rates == pytest.approx([1, 1, 1, 0.925, 0.85, 0.775, 0.7, 0.7], abs=1e-12)
    assert rates[0] == 1 and rates[-1] == 0.7
    assert training.warm_up(3, 0.5, begin=3, steps=0) == 0.5


def test_set_keep_rate_is_apply_with_that_rate():
    model = tokred.apply(tiny("deit"), "evit", keep_rate=0.5, stages=(1, 3), fuse=False)
    for rate in (1.0, 0.8, 0.5):
        training.set_keep_rate(model, rate)
        want = tokred.apply(tiny("deit"), "evit", keep_rate=rate, stages=(1, 3), fuse=False)
        with torch.no_grad():
            assert torch.equal(model(images()), want(images()))
    with pytest.raises(ValueError, match=r"evit: keep_rate must be in \(0, 1\], got 0"):
        training.set_keep_rate(model, 0)
    assert model.tokred_method.keep_rate == 0.5
    for other in (
        tiny("deit"),
        tokred.apply(tiny("deit"), "mctf", r=5),
        tokred.apply(tiny("deit"), "evit", tokens=[9, 4], stages=(1, 3)),
        tokred.apply(tiny("deit"), "sit", keep_rate=0.5, stages=(1, 3)),
    ):
        with pytest.raises(ValueError, match="set_keep_rate: the model must be patched, with a keep rate that no weig"):
            training.set_keep_rate(other, 0.7)
