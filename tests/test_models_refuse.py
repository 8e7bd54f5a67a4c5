"""What apply and remove refuse, with the reason, and without having changed anything."""

import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers import Attention, GlobalResponseNormMlp
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn.parallel import DataParallel
from vits import tiny

import tokred_kernels as tokred
from tokred_kernels.methods import METHODS

SMALL = dict(img_size=32, depth=2, embed_dim=32, num_heads=2)
vit = partial(VisionTransformer, patch_size=8, **SMALL)


class MyAttention(Attention):
    pass


class MyBlock(Block):
    pass


def replaced_forward(path):
    model = tiny("deit")
    module = model.get_submodule(path)
    module.forward = module.forward
    return model


def compiled_block():
    model = tiny("deit")
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


def compiled_in_place():
    model = tiny("deit")
    model.compile()
    return model


def gated():
    model = tiny("deit")
    model.blocks[1].attn = Attention(32, num_heads=2, gated=True)
    return model


def pooled_with_positions():
    model = tiny("siglip-map")
    model.attn_pool.pos_embed = nn.Parameter(torch.zeros(36, 32))
    return model


REFUSED = {
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
        "SwinTransformer .*window",
    ),
    "resnet": (lambda: timm.create_model("resnet18"), "ResNet .*no tokens"),
    "eva02": (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), "Eva .*rotary"),
    "rope": (lambda: timm.create_model("vit_base_patch16_rope_reg1_gap_256", depth=1), "Eva .*rotary"),
    "parallel scaling": (
        lambda: timm.create_model("vit_base_patch16_xp_224", depth=1),
        "ParallelScalingBlock .*parallel",
    ),
    "parallel things": (
        lambda: timm.create_model("vit_small_patch16_18x2_224", depth=1),
        "ParallelThingsBlock .*parallel",
    ),
    "post-norm": (lambda: vit(block_fn=ResPostBlock), "ResPostBlock .*normalises after"),
    "DiffAttention": (lambda: timm.create_model("vit_dlittle_patch16_reg1_gap_256", depth=1), "DiffAttention .*two"),
    "gated": (gated, r"blocks\.1\.attn is gated"),
    "attention subclass": (lambda: vit(attn_layer=MyAttention), r"blocks\.0\.attn is MyAttention"),
    "block subclass": (lambda: vit(block_fn=MyBlock), r"blocks\.0 is MyBlock"),
    "mlp": (
        lambda: vit(mlp_layer=lambda norm_layer=None, **k: GlobalResponseNormMlp(**k)),
        r"mlp is GlobalResponseNormMlp",
    ),
    "subclass": (lambda: type("MyViT", (VisionTransformer,), {})(patch_size=8, **SMALL), "MyViT"),
    "features_only": (lambda: timm.create_model("deit_tiny_patch16_224", features_only=True), "FeatureGetterNet"),
    "linear": (lambda: nn.Linear(2, 2), "Linear"),
    "compiled": (lambda: torch.compile(tiny("deit")), "compiled; apply first"),
    "compiled in place": (compiled_in_place, "compiled; apply first"),
    "compiled block": (compiled_block, r"blocks\.1 is compiled; apply first"),
    "data parallel": (lambda: DataParallel(tiny("deit")), "DataParallel; apply first"),
    "model.forward": (lambda: replaced_forward(""), "forward of the model was replaced"),
    "block.forward": (lambda: replaced_forward("blocks.1"), r"forward of blocks\.1 was replaced"),
    "attn.forward": (lambda: replaced_forward("blocks.1.attn"), r"forward of blocks\.1\.attn was replaced"),
    "attn_pool positions": (pooled_with_positions, "attn_pool has position embeddings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_and_left_alone(name):
    make, reason = REFUSED[name]
    model = make()
    before = [(type(m), set(vars(m))) for m in model.modules()]
    with pytest.raises(ValueError, match=reason) as error:
        tokred.apply(model, "tome", r=1)
    assert str(error.value).startswith("apply: ") and "\n" not in str(error.value)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before


S = dict(stages=(1, 2))
BAD_OPTIONS = {
    "unknown method": (dict(method="tomato", r=1), f"apply: unknown method 'tomato'; there is {', '.join(METHODS)}"),
    "unknown option": (
        dict(r=1, scores="cls"),
        "apply: tome has no option 'scores'; it takes keep_rate, stages, rule, tokens, r, prop_attn, metric",
    ),
    "no r": (dict(), "tome: give one of r=, keep_rate= and tokens="),
    "r and a rate": (dict(r=1, keep_rate=0.5), "tome: give one of r=, keep_rate= and tokens="),
    "r at stages": (
        dict(r=1, stages=(1,)),
        "tome: stages= and rule= go with keep_rate= and tokens=; r= may be a list, one int a block",
    ),
    "stages of tome too deep": (
        dict(keep_rate=0.5),
        "tome: stages must be below 4, the number of blocks, got (3, 6, 9)",
    ),
    "negative": (dict(r=-1), "tome: r must be at least 0, got -1"),
    "negative entry": (dict(r=[3, -1]), "tome: r must be at least 0, got [3, -1]"),
    "negative with inflection": (dict(r=(-3, 0.5)), "tome: r must be at least 0, got (-3, 0.5)"),
    "inflection above": (dict(r=(8, 1.5)), "r: the inflection must be in [-1, 1], got 1.5"),
    "inflection nan": (dict(r=(8, float("nan"))), "r: the inflection must be in [-1, 1], got nan"),
    "inflection text": (dict(r=(8, "x")), "r: the inflection must be in [-1, 1], got 'x'"),
    "float": (dict(r=8.0), "r must be an int, (int, inflection) or a list of ints, got 8.0"),
    "bool": (dict(r=True), "r must be an int, (int, inflection) or a list of ints, got True"),
    "text": (dict(r="8"), "r must be an int, (int, inflection) or a list of ints, got '8'"),
    "triple": (dict(r=(8, 1, 2)), "r must be an int, (int, inflection) or a list of ints, got (8, 1, 2)"),
    "float entry": (dict(r=[8, 0.5]), "r must be an int, (int, inflection) or a list of ints, got [8, 0.5]"),
    "topk neither": (dict(method="topk"), "topk: give either keep_rate= or tokens="),
    "topk both": (dict(method="topk", keep_rate=0.5, tokens=[5]), "topk: give either keep_rate= or tokens="),
    "r of topk": (
        dict(method="topk", r=5),
        "apply: topk has no option 'r'; it takes keep_rate, stages, rule, tokens, scores",
    ),
    "r of evit": (
        dict(method="evit", r=5),
        "apply: evit has no option 'r'; it takes keep_rate, stages, rule, tokens, scores, fuse, normalize",
    ),
    "rate 0": (dict(method="evit", keep_rate=0, **S), "evit: keep_rate must be in (0, 1], got 0"),
    "rate above 1": (dict(method="metr", keep_rate=1.01, **S), "metr: keep_rate must be in (0, 1], got 1.01"),
    "rate nan": (dict(method="evit", keep_rate=float("nan"), **S), "evit: keep_rate must be in (0, 1], got nan"),
    "rate bool": (dict(method="evit", keep_rate=True, **S), "evit: keep_rate must be in (0, 1], got True"),
    "rate text": (
        dict(method="evit", keep_rate="x", **S),
        "evit: keep_rate must be a number or have one entry a stage, 2, got 'x'",
    ),
    "rate nothing": (
        dict(method="evit", keep_rate=[None] * 2, **S),
        "evit: keep_rate must be in (0, 1], got [None, None]",
    ),
    "rates of another length": (
        dict(method="topk", keep_rate=[0.5], **S),
        "topk: keep_rate must be a number or have one entry a stage, 2, got [0.5]",
    ),
    "rule": (dict(method="topk", keep_rate=0.5, rule="x", **S), "topk: rule must be one of evit, wttu, got 'x'"),
    "rule beside tokens": (
        dict(method="topk", tokens=[9, 9], rule="x", **S),
        "topk: rule must be one of evit, wttu, got 'x'",
    ),
    "stages too deep": (
        dict(method="evit", keep_rate=0.5),
        "evit: stages must be below 4, the number of blocks, got (3, 6, 9)",
    ),
    "stages descending": (
        dict(method="evit", keep_rate=0.5, stages=(2, 1)),
        "evit: stages must be ascending, got (2, 1)",
    ),
    "stages twice": (dict(method="evit", keep_rate=0.5, stages=(1, 1)), "evit: stages must be ascending, got (1, 1)"),
    "stages negative": (
        dict(method="evit", keep_rate=0.5, stages=(-1,)),
        "evit: stages must be a list of ints of at least 0, got (-1,)",
    ),
    "stages no list": (
        dict(method="evit", keep_rate=0.5, stages=3),
        "evit: stages must be a list of ints of at least 0, got 3",
    ),
    "tokens 0": (
        dict(method="topk", tokens=[9, 0], **S),
        "topk: tokens must be a list of ints of at least 1, got [9, 0]",
    ),
    "tokens fractional": (
        dict(method="topk", tokens=[9, 0.5], **S),
        "topk: tokens must be a list of ints of at least 1, got [9, 0.5]",
    ),
    "tokens bool": (
        dict(method="topk", tokens=[9, True], **S),
        "topk: tokens must be a list of ints of at least 1, got [9, True]",
    ),
    "tokens of another length": (
        dict(method="topk", tokens=[9, 9, 9], **S),
        "topk: tokens must have one entry a stage, 2, or a block, 4, got [9, 9, 9]",
    ),
    "scores": (
        dict(method="topk", keep_rate=0.5, scores="max", **S),
        'topk: scores must be "cls" or "mean", got \'max\'',
    ),
    "fuse": (dict(method="evit", keep_rate=0.5, fuse="sum", **S), "evit: fuse must be True or False, got 'sum'"),
    "normalize": (dict(method="evit", keep_rate=0.5, normalize=1, **S), "evit: normalize must be True or False, got 1"),
    "prop_attn": (dict(r=1, prop_attn="no"), "tome: prop_attn must be True or False, got 'no'"),
    "metric": (dict(r=1, metric="cosine"), 'tome: metric must be "keys" or "projected", got \'cosine\''),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_and_the_model_left_alone(name):
    options, message = BAD_OPTIONS[name]
    model = tiny("deit")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokred.apply(model, **{"method": "tome", **options})
    assert type(model) is VisionTransformer and not hasattr(model, "tokred_method")


def test_integers_of_numpy_are_integers():
    x = torch.zeros(1, 3, 48, 48)
    for method, options in (
        ("tome", dict(r=np.int64(3))),
        ("tome", dict(r=[np.int64(3)])),
        ("evit", dict(tokens=np.array([9, 5]), stages=np.array([0, 2]))),
        ("topk", dict(keep_rate=np.float32(0.7), stages=(1,))),
    ):
        model = tokred.apply(tiny("deit"), method, **options)
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gap", "gap-reg4-nocls", "siglip-map", "no-prefix"])
@pytest.mark.parametrize("method", ["topk", "evit", "metr"])
def test_a_model_without_a_class_token_is_refused_with_the_way_out(method, name):
    model = tiny(name)
    with pytest.raises(ValueError, match=f'^{method}: the model has no class token to score by; use scores="mean"$'):
        tokred.apply(model, method, keep_rate=0.5, **S)
    assert not hasattr(model, "tokred_method")
    tokred.apply(model, method, keep_rate=0.5, scores="mean", **S)


def test_heads_too_wide_for_scores_are_refused():
    model = vit(num_heads=1, **{**{k: v for k, v in SMALL.items() if k != "num_heads"}, "embed_dim": 136})
    with pytest.raises(ValueError, match="topk: scores need heads of width 128 at most, got 136"):
        tokred.apply(model, "topk", keep_rate=0.5, stages=(1,))
    tokred.apply(model, "tome", r=1)


def test_a_patched_model_is_not_patched_again():
    model = tokred.apply(tiny("deit"), "tome", r=1)
    with pytest.raises(ValueError, match="patched already"):
        tokred.apply(model, "tome", r=2)


def test_distributed_wrappers_are_recognised_by_name():
    """DDP and FSDP need a process group; their classes are enough."""
    for name in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
        wrapper = type(name, (nn.Module,), {})
        outer = wrapper()
        outer.module = tiny("deit")
        with pytest.raises(ValueError, match=f"the model is wrapped in {name}; apply first"):
            tokred.apply(outer, "tome", r=1)
    inner = tiny("deit")
    inner.blocks[1].__class__ = type("FSDPBlock", (type("FSDPModule", (), {}), Block), {})
    with pytest.raises(ValueError, match=r"blocks\.1 is wrapped in FSDPModule; apply first"):
        tokred.apply(inner, "tome", r=1)


def test_remove_refuses_a_model_wrapped_or_compiled_since():
    model = tokred.apply(tiny("deit"), "tome", r=1)
    for outer in (DataParallel(model), torch.compile(model), nn.Sequential(model)):
        with pytest.raises(ValueError, match="holds a patched model"):
            tokred.remove(outer)
    block = model.blocks[0]
    model.blocks[0] = torch.compile(block)
    with pytest.raises(ValueError, match="uncompile"):
        tokred.remove(model)
    model.blocks[0] = block
    assert type(tokred.remove(model)) is VisionTransformer
