"""DynamicViT: inference and training against slow float64 forms, and what its loss needs."""

import copy

import method_oracles
import pytest
import torch
from timm.layers import set_reentrant_ckpt
from vits import images, randomised, tiny

import tokred_kernels as tokred
from tokred_kernels.methods.dynamicvit import Predictor

OPTIONS = dict(tokens=[25, 9], stages=(1, 3))


def patched(name="deit", dtype=torch.float64, **options):
    model = tokred.apply(tiny(name, **options), "dynamicvit", **OPTIONS)
    for index in OPTIONS["stages"]:
        part = randomised(model.blocks[index].tokred_part, index)
        part.in_conv[0].weight.data += 1
    return model.to(dtype)


def inference(index, part, x, _matrix):
    k = dict(zip(OPTIONS["stages"], OPTIONS["tokens"], strict=True)).get(index)
    if k is None:
        return None
    score = method_oracles.predictor(part, x, torch.ones(len(x), dtype=x.dtype))[:, 0].tolist()
    kept = sorted(sorted(range(len(x)), key=lambda i: (-score[i], i))[:k])
    row = torch.full((len(x),), -1)
    row[kept] = torch.arange(k)
    return x[kept], row


@pytest.mark.parametrize("name", ["no-prefix", "deit", "distilled", "dinov2-reg4", "gap", "siglip-map"])
def test_inference_is_the_float64_oracle(name):
    model = patched(name)
    with torch.no_grad():
        want, source = method_oracles.run(model, images(), inference)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-5)):
            other = copy.deepcopy(model).to(dtype)
            with tokred.trace(other) as t:
                got = other(images().to(dtype))
            assert torch.equal(t.source.long(), source)
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
        assert t.tokens == [model.num_prefix_tokens + n for n in (36, 36, 25, 25, 9)]


@pytest.mark.parametrize("C", [8, 10, 7])
@pytest.mark.parametrize("kept", ["some", "all", "none", None])
def test_the_predictor_is_the_oracles(C, kept):
    part = randomised(Predictor(C)).double()
    x = torch.randn(2, 9, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[1, :4] = 0
    mask = torch.ones(2, 9, dtype=torch.float64)
    if kept == "some":
        mask[0, ::2], mask[1, 3:] = 0, 0
    elif kept == "none":
        mask[:] = 0
    with torch.no_grad():
        got = part(x, None if kept is None else mask)
        for image, m, row in zip(x, mask, got, strict=True):
            log_p = method_oracles.predictor(part, image, m)
            torch.testing.assert_close(row, log_p[:, 0] - log_p[:, 1], rtol=1e-12, atol=1e-12)


def test_equal_scores_keep_the_lowest_indices():
    model = patched()
    for block in (1, 3):
        model.blocks[block].tokred_part.out_conv[4].weight.data.zero_()
    with torch.no_grad(), tokred.trace(model) as t:
        model(images().double())
    assert t.source[0].tolist() == [*range(10), *[-1] * 27] and torch.equal(t.source[0], t.source[1])


def test_near_certain_patches_are_still_ordered():
    """log p in float32 is 0 for each of them."""
    part = Predictor(8)
    part.out_conv[4].bias.data = torch.tensor([40.0, 0.0])
    with torch.no_grad():
        score = part(torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0)))
    assert (torch.nn.functional.logsigmoid(score.half()) == 0).all() and len(score.unique()) > 25


def draws(model, x, seed):
    """What the stages will draw after manual_seed(seed)."""
    torch.manual_seed(seed)
    shape = (len(x), model.patch_embed.num_patches, 2)
    return {block: torch.empty(shape, dtype=x.dtype).exponential_() for block in OPTIONS["stages"]}


def loss_of(logits, keep, patches):
    last = keep[3].detach()[..., None]
    ratios = sum((k.mean(1) - share).square().mean() for k, share in zip(keep.values(), (0.7, 0.25), strict=True))
    return logits.square().sum() + 2 * ratios + (patches * last).square().mean()


@pytest.mark.parametrize("name", ["deit", "qk_norm", "gap", "distilled"])
def test_training_is_the_float64_oracle(name):
    model, x = patched(name).train(), images().double()
    dense = tokred.remove(copy.deepcopy(model))
    parts = {block: copy.deepcopy(model.blocks[block].tokred_part) for block in OPTIONS["stages"]}
    noise = draws(model, x, 5)
    want = method_oracles.dynamicvit_training(dense, parts, x, noise)
    torch.manual_seed(5)
    got = tokred.policy_logits(model, x)
    if name == "distilled":  # its two heads are timm's own: only decisions and patches are looked at
        got, want = ((torch.zeros(1), *out[1:]) for out in (got, want))
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=1e-10)
    got_loss, want_loss = loss_of(*got), loss_of(*want)
    assert list(got[1]) == [1, 3]
    for block in (1, 3):
        assert set(got[1][block].unique().tolist()) <= {0.0, 1.0} and 0 < got[1][block].mean() < 1
        torch.testing.assert_close(got[1][block], want[1][block], rtol=0, atol=1e-12)
    assert (got[1][3] <= got[1][1]).all()
    torch.testing.assert_close(got[2], want[2], rtol=1e-9, atol=1e-9)

    got_loss.backward()
    want_loss.backward()
    oracle = dict(dense.named_parameters())
    oracle |= {f"blocks.{b}.tokred_part.{n}": p for b, part in parts.items() for n, p in part.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        w = oracle[parameter_name].grad
        g = parameter.grad
        assert (w is None) == (g is None), parameter_name
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-9 * w.abs().max().item() + 1e-13, msg=parameter_name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["deit", "avg-all"])  # LayerScale rounds otherwise when it is checkpointed
def test_checkpointed_training_has_the_same_gradients(name, reentrant):
    """Decisions included: the loss reaches them outside the blocks."""
    model = patched(name, torch.float32, drop_path_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1).train()

    def run():
        model.zero_grad()
        torch.manual_seed(3)
        outputs = tokred.policy_logits(model, images())
        loss_of(*outputs).backward()
        return outputs[1], {n: p.grad.clone() for n, p in model.named_parameters()}

    keep, want = run()
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        again, got = run()
    finally:
        set_reentrant_ckpt(False)
    assert all(torch.equal(keep[block], again[block]) for block in keep)
    for parameter in want:
        assert torch.equal(got[parameter], want[parameter]), parameter


@pytest.mark.parametrize("bias", [60.0, -60.0])
@pytest.mark.parametrize("name", ["deit", "gap", "siglip-map", "prr-token", "avgmax"])
def test_keeping_or_dropping_every_patch_in_training_is_finite(name, bias):
    if bias < 0 and name in ("siglip-map", "prr-token", "avgmax"):
        bias = -0.5  # of no patch at all there is no maximum
    model, x = patched(name, torch.float32).train(), images()
    for block in (1, 3):
        model.blocks[block].tokred_part.out_conv[4].weight.data.zero_()
        model.blocks[block].tokred_part.out_conv[4].bias.data = torch.tensor([bias, 0.0])
    torch.manual_seed(0)
    logits, keep, patches = tokred.policy_logits(model, x)
    if abs(bias) == 60:
        assert all((k == (bias > 0)).all() for k in keep.values())
    loss_of(logits, keep, patches).backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if bias > 0 and name == "deit":  # but for the 1e-6 of the formula, the unpatched model
        torch.testing.assert_close(logits, tokred.remove(model)(x), rtol=1e-4, atol=1e-4)


def test_dropped_patches_have_next_to_no_influence_in_training():
    """Their values reach the class token through 1e-6 / N only, and the gate of the formula is exact."""
    model = patched().train()
    block, size = model.blocks[2], torch.ones(2, 37, dtype=torch.float64)
    size[:, 5:20] = 0
    tokens = torch.randn(2, 37, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 5:20] += 1
    with torch.no_grad():
        a, b = block(tokens, size, 0)[0], block(other, size, 0)[0]
    kept = size[0] > 0
    assert 0 < (a - b)[:, kept].abs().max() < 1e-5 < (a - b)[:, ~kept].abs().max()


def test_attention_dropout_acts_on_the_matrix():
    block = patched(attn_drop_rate=0.5).train().blocks[2]
    block.attn.attn_drop.p = 1.0
    tokens, size = torch.randn(2, 37, 32, dtype=torch.float64), torch.ones(2, 37, dtype=torch.float64)
    want = tokens + block.branch(tokens.new_zeros(2, 2, 37, 16))
    assert torch.equal(block(tokens, size, 0)[0], want + block.feed_forward(want))


def test_the_gate_draws_with_the_predicted_probability():
    model = patched(dtype=torch.float32).train()
    part = model.blocks[1].tokred_part
    part.out_conv[4].weight.data.zero_()
    part.out_conv[4].bias.data = torch.tensor([1.0, 0.0])
    torch.manual_seed(0)
    policy = model.tokred_method.draw(model.blocks[1], torch.zeros(500, 37, 32), None)
    share = policy[:, 1:].mean().item()  # of 18,000: its standard deviation is 0.0033
    assert abs(share - 0.7311) < 0.015 and (policy[:, 0] == 1).all()


def test_trace_in_training_marks_what_is_masked():
    model = patched(dtype=torch.float32).train()
    with tokred.trace(model) as t:
        _, keep, _ = tokred.policy_logits(model, images())
    assert t.tokens == [37] * 5
    want = torch.where(keep[3] > 0, torch.arange(1, 37), -1)
    assert torch.equal(t.source[:, 1:].long(), want)
    assert torch.equal(t.counts[:, 4], 1 + keep[3].detach().sum(1).long())


def test_training_compiles_as_one_graph():
    model = patched(dtype=torch.float32).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_autocast_training_decides_in_float32(dtype):
    model = patched(dtype=torch.float32).train()
    half = copy.deepcopy(model).to(dtype)
    _, keep, _ = tokred.policy_logits(half, images().to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        logits, mixed, _ = tokred.policy_logits(model, images())
    for decisions in (keep, mixed):
        assert all(k.dtype == torch.float32 and k.requires_grad for k in decisions.values())
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_pooling_in_training_needs_to_know_what_was_dropped():
    model = patched("gap", torch.float32).train()
    features = model.forward_features(images())
    with pytest.raises(ValueError, match="forward_head: avg pooling must weigh reduced tokens by their size"):
        model.forward_head(features)
    model.eval()
    with torch.no_grad():
        features = model.forward_features(images())
        assert torch.equal(model.forward_head(features), model(images()))


def test_policy_logits_refuses_in_one_line():
    for model, message in (
        (tiny("deit"), 'policy_logits: the model is not patched with "dynamicvit"'),
        (tokred.apply(tiny("deit"), "topk", **OPTIONS), 'policy_logits: the model is not patched with "dynamicvit"'),
        (patched(), "policy_logits: the model is in eval mode, where patches are removed; call model.train()"),
        (
            torch.compile(patched().train(), backend="eager"),
            "policy_logits: the model is compiled; use the uncompiled model",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            tokred.policy_logits(model, images().double())
        assert str(caught.value) == message


def test_a_keep_rate_of_1_has_no_predictors():
    model = tokred.apply(tiny("deit"), "dynamicvit", keep_rate=[1, 0.5], stages=(1, 3))
    assert [block.tokred_part is not None for block in model.blocks] == [False, False, False, True]
