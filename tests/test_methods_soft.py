"""SiT, PatchMerger and Sinkhorn against slow float64 forms."""

import copy

import method_oracles
import pytest
import torch
from method_oracles import patchmerger, sinkhorn, sit
from vits import images, randomised, tiny

import tokred_kernels as tokred
from tokred_kernels.methods import METHODS
from tokred_kernels.methods._learned import over_patches

FORMS = {  # method, its options, the oracle's
    "sit": ("sit", {}, {}),
    "patchmerger": ("patchmerger", {}, {}),
    "patchmerger-scaled": ("patchmerger", {"scaled_attention": True}, {"scale": 32**-0.5}),
    "sinkhorn": ("sinkhorn", {}, {}),
    "sinkhorn-sharp": ("sinkhorn", {"eps": 0.05, "iterations": 8}, {"eps": 0.05, "iterations": 8}),
    "sinkhorn-sharpest": ("sinkhorn", {"eps": 0.025, "iterations": 1}, {"eps": 0.025, "iterations": 1}),
}
ORACLES = {"sit": sit, "patchmerger": patchmerger, "sinkhorn": sinkhorn}


def part_of(form, clusters, width=32, seed=0):
    """A learned module with weights as of training."""
    method, options, _ = FORMS[form]
    chosen = METHODS[method](keep_rate=0.5, **options)
    return randomised(chosen.weighting(width, clusters), seed).eval()


def patches(kind, P=12, C=32, seed=3):
    x = torch.randn(2, P, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "zeros":
        x[:, ::3] = 0
    elif kind == "equal":
        x[:] = x[:, :1].clone()
    elif kind == "duplicates":
        x[:, 1::2] = x[:, ::2].clone()
    elif kind == "opposite":
        x[:, 1::2] = -x[:, ::2].clone()
    elif kind == "large":
        x *= 1e4
    elif kind == "tiny":
        x *= 1e-9
    elif kind == "one far":
        x[:, 5] *= 1e3
    return x


KINDS = ["random", "zeros", "equal", "duplicates", "opposite", "large", "tiny", "one far"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clusters", [1, 5, 11])
def test_clusters_are_the_oracles(form, kind, clusters):
    part, x = part_of(form, clusters), patches(kind)
    oracle, options = ORACLES[FORMS[form][0]], FORMS[form][2]
    exact = copy.deepcopy(part).double()
    with torch.no_grad():
        want = [torch.stack(pair) for pair in zip(*(oracle(exact, image, **options) for image in x), strict=True)]
        got = exact(x)
        # Opposite patches may cancel to nothing: there the scale is that of what was added.
        scale = [1.0 if kind == "opposite" else t.abs().max().item() for t in want]
        for a, b, s in zip(got, want, scale, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * s)
        rounded = part(x.float())
    # float32 moves a logit l by about 1e-6 l, and with it a weight by as much of itself.
    spread = max(1.0, 1 / options.get("eps", 1.0)) * (10 if kind in ("large", "one far") else 1)
    for a, b, s in zip(rounded, want, scale, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 5e-6 * spread * s


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_float32(form, dtype):
    part, x = part_of(form, 5).to(dtype), patches("random").to(dtype)
    with torch.no_grad():
        rows, W = part(x)
        exact = copy.deepcopy(part).double()(x.double())
    assert W.dtype == torch.float32 and rows.isfinite().all()
    tolerance = 40 * torch.finfo(dtype).eps * (20 if form.startswith("sinkhorn-") else 1)
    assert (rows - exact[0]).abs().max() <= tolerance * exact[0].abs().max()
    sums = W.sum(1 if form.startswith("sinkhorn") else 2)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("form", ["sit", "patchmerger", "sinkhorn"])
@pytest.mark.parametrize("name", ["no-prefix", "deit", "distilled", "dinov2-reg4", "cls-reg9", "gap"])
def test_models_agree_with_the_float64_oracle(form, name):
    model = randomised(tokred.apply(tiny(name), form, tokens=[25, 9], stages=(1, 3))).eval()

    def reduce(index, part, x, _matrix):
        if part is None:
            return None
        rows, W = ORACLES[form](part, x)
        return rows, W.argmax(0)

    with torch.no_grad():
        want, source = method_oracles.run(model, images(), reduce)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-5)):
            patched = copy.deepcopy(model).to(dtype)
            with tokred.trace(patched) as t:
                got = patched(images().to(dtype))
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
            p = model.num_prefix_tokens
            assert t.tokens == [p + n for n in (36, 36, 25, 25, 9)]
            if dtype == torch.float64:
                assert torch.equal(t.source.long(), source)


def test_no_weight_is_subnormal():
    """A CPU multiplies such weights 25 times slower; of PatchMerger's, as it starts, one in 20 was."""
    logits, tiny = torch.linspace(0, -103, 1000), torch.finfo(torch.float32).tiny
    plain, W = logits.softmax(0), over_patches(logits)
    assert ((plain > 0) & (plain < tiny)).any()
    assert torch.equal(W, torch.where(plain > tiny, plain, 0))


@pytest.mark.parametrize("form", ["sit", "patchmerger"])
def test_constant_patches_stay_constant(form):
    part, x = part_of(form, 5), patches("equal").float()
    with torch.no_grad():
        rows, _ = part(x)
        want = part.norm(x) if form == "patchmerger" else x
    torch.testing.assert_close(rows, want[:, :1].expand_as(rows), rtol=1e-5, atol=1e-6)


def test_sinkhorn_shares_out_every_patch_and_fills_clusters_alike():
    part, x = part_of("sinkhorn", 4), patches("random").float()
    part.iterations = 200
    with torch.no_grad():
        _, W = part(x)
    torch.testing.assert_close(W.sum(1), torch.ones(2, 12))
    torch.testing.assert_close(W.sum(2), torch.full((2, 4), 3.0))


def test_sinkhorn_writes_nothing_in_forward():
    """The published code stores the normalised centres, in eval mode too."""
    model = tokred.apply(tiny("deit"), "sinkhorn", keep_rate=0.5, stages=(1,))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    model(images())
    model.train()(images()).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize("form", ["sit", "patchmerger", "sinkhorn"])
def test_equal_weights_name_the_lowest_cluster(form):
    model = tokred.apply(tiny("deit"), form, tokens=[9], stages=(2,))
    for parameter in model.blocks[2].tokred_part.parameters():
        parameter.data.zero_()
    with torch.no_grad(), tokred.trace(model) as t:
        model(images())
    assert t.source.tolist() == [[0] + [1] * 36] * 2


@pytest.mark.parametrize("form", ["sit", "patchmerger", "sinkhorn"])
def test_another_resolution_has_the_same_clusters(form):
    """Their number is that of the parameters; fewer patches than clusters are left alone."""
    model = tokred.apply(tiny("deit", dynamic_img_size=True), form, keep_rate=0.7, stages=(1, 3))
    for side, counts in ((48, [36, 36, 25, 25, 17]), (64, [64, 64, 25, 25, 17]), (32, [16] * 5), (40, [25] * 4 + [17])):
        with torch.no_grad(), tokred.trace(model) as t:
            assert model(images(2, side)).isfinite().all()
        assert t.tokens == [1 + n for n in counts]


def test_a_stage_that_would_keep_every_patch_has_no_clusters():
    model = tokred.apply(tiny("deit", dynamic_img_size=True), "sit", tokens=[36, 20], stages=(1, 2))
    assert [block.tokred_part is not None for block in model.blocks] == [False, False, True, False]
    with torch.no_grad(), tokred.trace(model) as t:
        model(images(2, 64))
    assert t.tokens == [65, 65, 65, 21, 21]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("patchmerger", dict(scaled_attention=1), "patchmerger: scaled_attention must be True or False, got 1"),
        ("sinkhorn", dict(eps=0.01), "sinkhorn: eps must be a number of at least 0.025, got 0.01"),
        ("sinkhorn", dict(eps="1"), "sinkhorn: eps must be a number of at least 0.025, got '1'"),
        ("sinkhorn", dict(eps=float("nan")), "sinkhorn: eps must be a number of at least 0.025, got nan"),
        ("sinkhorn", dict(iterations=0), "sinkhorn: iterations must be an int of at least 1, got 0"),
        ("sinkhorn", dict(iterations=2.0), "sinkhorn: iterations must be an int of at least 1, got 2.0"),
        ("sit", dict(tokens=[5]), "sit: tokens must have one entry a stage, 3, or a block, 4, got [5]"),
    ],
)
def test_bad_options_are_refused_in_one_line(method, options, message):
    model = tiny("deit")
    with pytest.raises(ValueError) as caught:
        tokred.apply(model, method, **({} if "tokens" in options else {"keep_rate": 0.5, "stages": (1,)}), **options)
    assert str(caught.value) == message
    assert not hasattr(model, "tokred_method")
