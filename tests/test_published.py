"""Published checkpoints in timm models, on synthetic weights with the published names and shapes."""

import copy

import pytest
import torch
import vits
from test_models_metr import checkpoint as metr
from vits import images, tiny

import tokred_kernels as tokred

# DeiT-S in small: the published shapes with D = 32, twelve blocks, stages at 3, 6, 9 and 137, 96, 67 of 196 patches.
D, KEPT = 32, (137, 96, 67)
DEIT = dict(img_size=224, patch_size=16, embed_dim=D, depth=12, num_heads=2, num_classes=7)


def _layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def score_predictor(_):
    wide = {**_layer("in_conv.0", D), **_layer("in_conv.1", D, D), **_layer("out_conv.0", D // 2, D)}
    return {**wide, **_layer("out_conv.2", D // 4, D // 2), **_layer("out_conv.4", 2, D // 4)}


def slimming(n):
    layers = {**_layer("weight.0", D), **_layer("weight.1", D // 2, D), **_layer("weight.3", n, D // 2)}
    return {"scale": (1, 1, 1), **layers}


PARTS = {
    "dynamicvit": ("score_predictor", score_predictor),
    "dpcknn": ("cluster_layers", lambda n: _layer("score", 1, D)),
    "sit": ("cluster_layers", slimming),
    "patchmerger": ("cluster_layers", lambda n: {"queries": (n, D), **_layer("norm", D)}),
    "sinkhorn": ("cluster_layers", lambda n: {"v": (n, D)}),
}
PLAIN = ("evit", "topk", "ats", "tome", "kmedoids", "radial", "mctf")


def dense(seed):
    return vits.randomised(vits.timm.create_model("deit_small_patch16_224", **DEIT), seed).eval()


def weights(method):
    """As published: timm's names, and the parts of the three stages under theirs."""
    found = dict(dense(5).state_dict())
    name, shapes = PARTS.get(method, ("", lambda n: {}))
    generator = torch.Generator().manual_seed(6)
    for stage, n in enumerate(KEPT):
        for key, shape in shapes(n).items():
            found[f"{name}.{stage}.{key}"] = torch.randn(shape, generator=generator)
    return found


def patched(method):
    return tokred.apply(dense(0), method, **(dict(r=16) if method == "mctf" else dict(keep_rate=0.7)))


@pytest.mark.parametrize("method", [*PLAIN, *PARTS])
def test_every_published_tensor_arrives(method):
    published = weights(method)
    model = patched(method)
    assert tokred.load_published(model, {"model": published, "epoch": 29}) is model
    own = model.state_dict()
    assert len(own) == len(published)
    for name, t in published.items():
        if name.startswith(("score_predictor.", "cluster_layers.")):
            name = f"blocks.{(3, 6, 9)[int(name.split('.')[1])]}.tokred_part.{name.split('.', 2)[2]}"
        assert torch.equal(own[name], t), name


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema"])
def test_averaged_weights(name):
    model = tokred.load_published(tiny("deit"), {"model": {}, name: tiny("deit", 5).state_dict()}, ema=True)
    with torch.no_grad():
        assert torch.equal(model(images()), tiny("deit", 5)(images()))
    with pytest.raises(ValueError, match="load_published: the checkpoint holds no averaged weights"):
        tokred.load_published(model, {"model": {}}, ema=True)


@pytest.mark.parametrize("exits", [False, True])
def test_exits_are_kept_or_dropped(exits):
    model = tokred.apply(tiny("deit"), "metr", keep_rate=0.7, stages=(1, 2))
    tokred.load_published(model, metr(), exits=exits)
    assert hasattr(model, "tokred_exits") == exits
    with torch.no_grad():
        want = tokred.load_metr(copy.deepcopy(model), metr(), exits=exits)
        assert torch.equal(model(images()), want(images()))
        if exits:
            got, want = (tokred.exit_logits(m, images())[1] for m in (model, want))
            assert all(torch.equal(got[block], want[block]) for block in (1, 2, 3))


def test_distilled_models_have_names_of_their_own():
    model = tokred.apply(tiny("distilled"), "evit", keep_rate=0.7, stages=(1, 2))
    tokred.load_published(model, {"model": tiny("distilled", 5).state_dict()})
    names = model.state_dict()
    assert "dist_token" in names and torch.equal(names["head_dist.weight"], tiny("distilled", 5).head_dist.weight)


@pytest.mark.parametrize("name", ["deit", "distilled", "cls-reg9"])
def test_positions_of_another_resolution_are_resized_and_those_of_the_prefix_kept(name):
    small, large = tiny(name, 5), tiny(name, img_size=96)
    tokred.load_published(large, small.state_dict())
    prefix = 0 if small.no_embed_class else small.num_prefix_tokens
    got, had = large.pos_embed, small.pos_embed
    assert got.shape[1] == prefix + 144 and torch.equal(got[:, :prefix], had[:, :prefix])
    plain = torch.nn.functional.interpolate(
        had[:, prefix:].mT.unflatten(2, (6, 6)), (12, 12), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(got[:, prefix:], plain.flatten(2).mT)


def test_what_does_not_fit_is_refused_and_the_model_left_alone():
    model = patched("sit")
    before = copy.deepcopy(model.state_dict())
    half = weights("sit")
    half["cluster_layers.1.weight.3.weight"] = torch.zeros(49, D // 2)
    del half["cluster_layers.2.scale"]
    for given, said in (
        (
            half,
            r"9.tokred_part.scale is missing, blocks.6.tokred_part.weight.3.weight is \[49, 16\], the model's \[96",
        ),
        (weights("patchmerger"), r"blocks.3.tokred_part.scale is missing, .* and \d+ more"),
        (weights("topk"), "blocks.3.tokred_part.scale is missing"),
        ({**weights("sit"), "cluster_layers.3.scale": torch.zeros(1)}, "cluster_layers.3.scale is unknown"),
        ({**weights("sit"), "pos_embed": torch.zeros(1, 190, D)}, r"pos_embed is \[1, 190, 32\], the model's \[1, 197"),
    ):
        with pytest.raises(ValueError, match=rf"^load_published: the weights do not fit the model: .*{said}"):
            tokred.load_published(model, given)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"cluster_layers\.0\.scale is unknown"):
        tokred.load_published(dense(0), weights("sit"))
