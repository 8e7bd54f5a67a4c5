"""Top-K and EViT in timm models: against timm at keep rate 1, against a plain float64 form below it."""

import copy
import math
from decimal import Decimal

import pytest
import torch
import vits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_tome import CountOps, unfused
from vits import TINY, assert_same_forward, images, reduced, tiny

import tokred_kernels as tokred

FORMS = {  # method, its own options, `fuse` of the oracle
    "topk": ("topk", {}, "none"),
    "evit": ("evit", {}, "sum"),
    "evit-normalize": ("evit", {"normalize": True}, "mean"),
    "evit-no-fuse": ("evit", {"fuse": False}, "none"),
    "metr": ("metr", {}, "sum"),
}


def scores_of(model):
    return "cls" if model.has_class_token else "mean"


def traced(model, x):
    with torch.no_grad(), tokred.trace(model) as t:
        model(x)
    return t


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [(name, "evit", dict(keep_rate=1)) for name in TINY]
    + [("gap", "topk", dict(keep_rate=[1.0, 1.0])), ("distilled", "metr", dict(tokens=[36, 99]))],
)
def test_keeping_everything_is_timm_bit_for_bit(name, method, options):
    model = tiny(name)
    assert_same_forward(reduced(copy.deepcopy(model), method, stages=(1, 3), **options), model, images())


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in TINY for form in FORMS if form in ("topk", "evit") or name in ("distilled", "avg-all")],
)
def test_agrees_with_the_float64_oracle(name, form):
    method, options, fuse = FORMS[form]
    model = tiny(name).double()
    with torch.no_grad():
        want, source, clear = vits.selection_oracle(model, images().double(), {1: 25, 3: 9}, scores_of(model), fuse)
    assert clear, "the seed leaves a choice to rounding"
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        patched = reduced(copy.deepcopy(model).to(dtype), method, stages=(1, 3), tokens=[25, 9], **options)
        with torch.no_grad(), tokred.trace(patched) as t:
            got = patched(images().to(dtype))
        assert torch.equal(t.source.long(), source)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@settings(deadline=None, max_examples=20)
@given(
    st.dictionaries(st.integers(0, 3), st.integers(1, 40), min_size=1),
    st.integers(0, 10**6),
    st.sampled_from(["topk", "evit", "evit-normalize"]),
    st.sampled_from(["distilled", "gap-reg4-nocls"]),
)
def test_agrees_with_the_float64_oracle_for_any_schedule(keep, seed, form, name):
    method, options, fuse = FORMS[form]
    model, x = tiny(name).double(), images(1, seed=seed).double()
    stages = sorted(keep)
    with torch.no_grad():
        want, source, _ = vits.selection_oracle(model, x, keep, scores_of(model), fuse)
        patched = reduced(model, method, stages=stages, tokens=[keep[s] for s in stages], **options)
        with tokred.trace(patched) as t:
            torch.testing.assert_close(patched(x), want, rtol=1e-9, atol=1e-9)
    assert torch.equal(t.source.long(), source)


@pytest.mark.parametrize("scores", ["cls", "mean"])
@pytest.mark.parametrize("form", ["evit", "evit-normalize"])
def test_gradients_flow_through_the_scores_of_the_fused_token(form, scores):
    method, options, fuse = FORMS[form]
    model, x = tiny("qk_norm").double(), images().double()
    logits, _, clear = vits.selection_oracle(model, x, {0: 20, 2: 9}, scores, fuse)
    assert clear
    logits.square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    patched = tokred.apply(model, method, stages=(0, 2), tokens=[20, 9], scores=scores, **options)
    patched.train()(x).square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[n], rtol=1e-9, atol=1e-9 * want[n].abs().max().item() + 1e-15, msg=n)


def test_the_scores_carry_gradients_of_their_own():
    """Without them, the query projection of the class token would get other gradients than it does."""
    model = tokred.apply(tiny("deit").double(), "evit", keep_rate=0.5, stages=(2,))
    x = images().double()

    def query_gradient():
        model.zero_grad()
        model(x).square().sum().backward()
        return model.blocks[2].attn.qkv.weight.grad[:32].clone()

    with_scores = query_gradient()
    attention = torch.ops.tokred.attention
    try:
        torch.ops.tokred.attention = lambda *a, **o: (lambda out, s: (out, s.detach()))(*attention(*a, **o))
        without = query_gradient()
    finally:
        torch.ops.tokred.attention = attention
    assert (with_scores - without).abs().max() > 1e-3 * with_scores.abs().max()


PUBLISHED = [  # patches left after blocks 3, 6, 9, the fused token among them
    ("topk", 0.9, [176, 158, 142]),
    ("topk", 0.7, [137, 96, 67]),
    ("topk", 0.5, [98, 49, 24]),
    ("topk", 0.25, [49, 12, 3]),
    ("evit", 0.9, [178, 162, 147]),
    ("evit", 0.7, [139, 99, 71]),
    ("evit", 0.5, [99, 51, 27]),
    ("evit", 0.25, [50, 14, 5]),
]


@pytest.mark.parametrize(("method", "keep_rate", "left"), PUBLISHED)
def test_token_counts_are_the_published_ones(method, keep_rate, left):
    model = tokred.apply(TINY["deit"](img_size=112, depth=12), method, keep_rate=keep_rate).eval()  # 196 patches
    a, b, c = (1 + n for n in left)
    assert traced(model, images(1, 112)).tokens == [197] * 4 + [a] * 3 + [b] * 3 + [c] * 3


@pytest.mark.parametrize("method", ["topk", "evit"])
@pytest.mark.parametrize("rule", ["evit", "wttu"])
@pytest.mark.parametrize("keep_rate", [0.55, [0.9, 0.55], 0.29])
def test_rules_count_in_decimals(method, rule, keep_rate):
    """0.55 of 100 patches are 55, where floats make it 56; each rule in exact decimals."""
    model = tokred.apply(TINY["deit"](img_size=80), method, keep_rate=keep_rate, rule=rule, stages=(0, 2)).eval()
    left, tokens = 100, [101]
    for stage in (0, 1):
        rate = Decimal(str(keep_rate[stage] if isinstance(keep_rate, list) else keep_rate))
        if rule == "evit":
            kept = math.ceil(rate * left)
        else:
            kept = math.floor((rate if isinstance(keep_rate, list) else rate ** (stage + 1)) * 100)
        left = kept + (method == "evit")
        tokens += [1 + left] * 2
    assert traced(model, images(1, 80)).tokens == tokens


def test_a_rate_keeps_at_least_one_patch():
    model = tokred.apply(tiny("deit"), "topk", keep_rate=0.1, stages=(0, 1, 2))
    assert traced(model, images()).tokens == [37, 4, 2, 2, 2]


def test_patch_dropout_is_counted_from_the_patches_that_are_left():
    model = tokred.apply(tiny("deit", patch_drop_rate=0.5), "topk", keep_rate=0.5, stages=(1, 3)).train()
    with tokred.trace(model) as t:
        model(images())
    assert t.tokens == [19, 19, 10, 10, 5]


def test_a_single_fused_token_is_fused_all_the_same():
    """One patch too many: as published it stays as a fused token, scaled by its score, so the count is unchanged."""
    model = tiny("deit").double()
    x = images().double()
    with torch.no_grad():
        want, source, _ = vits.selection_oracle(model, x, {1: 35}, "cls", "sum")
        patched = tokred.apply(copy.deepcopy(model), "evit", tokens=[35], stages=(1,))
        with tokred.trace(patched) as t:
            torch.testing.assert_close(patched(x), want, rtol=1e-9, atol=1e-9)
    assert t.tokens == [37] * 5 and t.fused == [None, 36, None, None] and torch.equal(t.source.long(), source)


@pytest.mark.parametrize("name", TINY)
def test_prefix_tokens_stay_in_front(name):
    model = reduced(tiny(name), "evit", tokens=[1, 1], stages=(0, 2))
    p = model.num_prefix_tokens
    for assign in traced(model, images()).assign:
        if assign is not None:
            assert torch.equal(assign[:, :p], torch.arange(p, dtype=torch.int32).expand(2, p))


def test_constant_tokens_stay_constant_under_the_normalised_mean():
    model = tokred.apply(tiny("gap"), "evit", keep_rate=0.5, stages=(0, 2), scores="mean", normalize=True)
    for p in (model.pos_embed, model.patch_embed.proj.weight):
        p.data.zero_()
    with torch.no_grad():
        x = model.forward_features(images())
    assert x.shape[1] == 11
    torch.testing.assert_close(x, x[:, :1].expand_as(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["deit", "siglip-map", "cls-reg9"])
def test_an_image_alone_keeps_what_it_keeps_in_its_batch(name):
    model = reduced(tiny(name), "evit", keep_rate=0.6, stages=(0, 1, 3))
    vits.assert_one_image_alone(lambda x: traced(model, x).source.numpy(), images(3))


@pytest.mark.parametrize("keys", ["equal", "zero"])
def test_tied_scores_keep_the_lowest_indices(keys):
    model = tokred.apply(tiny("deit", qkv_bias=True), "topk", tokens=[20, 9], stages=(0, 2))
    for block in model.blocks:
        block.attn.qkv.weight.data[32:64] = 0
        block.attn.qkv.bias.data[32:64] = 0 if keys == "zero" else 0.5
    source = traced(model, images()).source
    assert source[0].tolist() == [*range(10), *[-1] * 27] and torch.equal(source[0], source[1])


@pytest.mark.parametrize("form", ["topk", "evit"])
def test_heads_that_our_attention_does_not_take_are_padded(form):
    method, _, fuse = FORMS[form]
    model = tiny("deit", embed_dim=24).double()  # heads of width 12
    with torch.no_grad():
        want, _, _ = vits.selection_oracle(model, images().double(), {1: 25}, "cls", fuse)
        got = tokred.apply(model, method, stages=(1,), tokens=[25])(images().double())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["deit", "gap-reg4-nocls", "siglip-map"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_and_autocast_score_in_float32(name, dtype):
    model = reduced(tiny(name), "evit", keep_rate=0.7, stages=(0, 2))
    seen = []
    with torch.no_grad():
        want = model(images())
        got = copy.deepcopy(model).to(dtype)(images().to(dtype))
        gather = torch.ops.tokred.topk_gather
        try:
            torch.ops.tokred.topk_gather = lambda x, score, *a, **o: (
                seen.append(score.dtype),
                gather(x, score, *a, **o),
            )[1]
            with torch.autocast("cpu", dtype=dtype):
                mixed = model(images())
        finally:
            torch.ops.tokred.topk_gather = gather
    assert seen == [torch.float32] * 2 and got.dtype == dtype
    for other in (got.float(), mixed.float()):  # half precision may keep other patches
        assert (other - want).abs().max() < 0.5 * want.abs().max()


def test_a_reducing_step_dispatches_one_op_less_than_the_dense_block():
    """C10: the fused tail is also an addition and the norm; the scores come from the attention. In training,
    topk_gather comes on top."""
    dense = tiny("deit").blocks[0]
    block = tokred.apply(tiny("deit"), "evit", keep_rate=0.7, stages=(0,)).blocks[0]
    x = torch.randn(2, 37, 32)
    with torch.no_grad(), CountOps() as plain:
        dense(x)
    names = ["tokred::attention" if "attention" in name else name for name in plain.names]
    fused = [*names, "tokred::add_topk_gather_norm"]
    for absorbed in ("aten::add.Tensor", "aten::native_layer_norm", "aten::addmm"):
        fused.remove(absorbed)
    fused.append("aten::mm")
    for r, want in ((5, fused), (0, names)):
        with torch.no_grad(), CountOps() as counted:
            block(x, None, r)
        assert sorted(counted.names) == sorted(want)
    with torch.no_grad(), unfused(block), CountOps() as counted:
        block(x, None, 5)
    assert sorted(counted.names) == sorted([*names, "tokred::topk_gather"])


def test_attention_dropout_is_refused_where_scores_are_needed_and_only_in_training():
    model = tokred.apply(tiny("deit", attn_drop_rate=0.1), "topk", keep_rate=0.5, stages=(1,))
    assert model(images()).isfinite().all()
    with pytest.raises(ValueError, match=r"no dropout: train with attn_drop = 0, got 0\.1"):
        model.train()(images())
    tokred.remove(model)
    tokred.apply(model, "topk", keep_rate=1, stages=(1,))(images()).sum().backward()


def test_averages_are_plain_means_of_what_is_left():
    model = tokred.apply(tiny("gap"), "topk", tokens=[9], stages=(2,), scores="mean")
    with torch.no_grad():
        features = model.forward_features(images())
        assert features.shape[1] == 9
        torch.testing.assert_close(model(images()), model.head(model.fc_norm(features.mean(1))))
        assert torch.equal(model.forward_head(features), model(images()))
