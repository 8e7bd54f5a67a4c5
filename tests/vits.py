"""Small timm models with every feature that token reduction must honour, and float64 oracles of the methods in them."""

import copy
import dataclasses
from functools import partial

import numpy as np
import oracle
import timm
import torch
from timm.layers import GluMlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokred_kernels as tokred
from tokred_kernels import methods

SMALL = dict(img_size=48, embed_dim=32, depth=4, num_heads=2, num_classes=7)  # 9 patches of 16 x 16
_vit = partial(VisionTransformer, patch_size=8, **SMALL)  # 36 patches


def _timm(name: str, **options):
    return partial(timm.create_model, name, **{**SMALL, "patch_size": 8, **options})


TINY = {
    "deit": _timm("deit_small_patch16_224"),
    "distilled": _timm("deit_small_distilled_patch16_224"),
    "deit3": _timm("deit3_small_patch16_224"),
    "dinov2-reg4": _timm("vit_small_patch14_reg4_dinov2"),
    "dinov2-swiglu": _timm("vit_giant_patch14_dinov2"),
    "gap": _timm("vit_medium_patch16_gap_240"),
    "gap-reg4-nocls": _timm("vit_little_patch16_reg4_gap_256"),
    "clip-norm_pre": _timm("vit_base_patch16_clip_224"),
    "siglip-map": _timm("vit_base_patch16_siglip_224"),
    "map-reg4": _timm("vit_so150m_patch16_reg4_map_256"),
    "qk_norm": partial(_vit, qk_norm=True, init_values=0.5),
    "scale_norm": partial(_vit, scale_attn_norm=True, scale_mlp_norm=True, mlp_layer=GluMlp),
    "cls-reg9": partial(_vit, reg_tokens=9, no_embed_class=True),
    "avg-all": partial(_vit, global_pool="avg", pool_include_prefix=True, reg_tokens=2),
    "avgmax": partial(_vit, global_pool="avgmax", fc_norm=False),
    "max": partial(_vit, global_pool="max"),
    "prr-token": partial(_vit, global_pool="prr"),
    "prr-avg": partial(_vit, global_pool="prr", class_token=False),
    "no-pool": partial(_vit, global_pool=""),
    "no-head": partial(_vit, num_classes=0, qkv_bias=False),
    "no-prefix": partial(_vit, class_token=False, global_pool="avg", pos_embed="none"),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights as varied as a trained model's: timm leaves LayerScale, biases and tokens almost at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            unit = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma"))
            p.data.copy_(0.2 * noise + (1 if unit else 0))
        elif name.endswith("weight"):
            p.data.copy_(noise * (p[0].numel()) ** -0.5)
        else:
            p.data.copy_(noise)
    return model


def tiny(name: str, seed: int = 0, **options) -> nn.Module:
    return randomised(TINY[name](**options), seed).eval()


def images(batch: int = 2, side: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


# Each method with options that reduce these models of four blocks; one that is not named keeps 0.7 in two stages.
_OPTIONS = {
    "tome": dict(r=5),
    "mctf": dict(r=5, stages=(1, 3)),
    "evit": dict(keep_rate=0.7, stages=(0, 2)),
    "metr": dict(tokens=[30, 30, 18, 5]),
}
METHODS = {name: _OPTIONS.get(name, dict(keep_rate=0.7, stages=(1, 3))) for name in methods.METHODS}
LEAST = {"mctf": 10}  # tokens that a method always leaves
# The same for models of two blocks.
SHORT = {name: {**options, "stages": (1,)} if "stages" in options else options for name, options in METHODS.items()}
SHORT["metr"] = dict(tokens=[30, 18])
SELECT = {"topk", "evit", "metr", "ats", "dynamicvit", "radial"} & METHODS.keys()  # rows are tokens, or one fused token
SOFT = {"sit", "patchmerger", "sinkhorn"} & METHODS.keys()  # every row is a weighted sum of all patches
FIXED = {"radial"}  # to one grid of patches
NEEDS_CLASS_TOKEN = {"ats"}
_CLASSLESS = {"gap", "gap-reg4-nocls", "siglip-map", "map-reg4", "prr-avg", "no-prefix"}


def pairs(*names: str, but: set[str] = frozenset()) -> list[tuple[str, str]]:
    """(model, method) for models by name and every method that runs in them, but some."""
    return [
        (name, method)
        for name in names
        for method in METHODS
        if method not in but and not (name in _CLASSLESS and method in NEEDS_CLASS_TOKEN)
    ]


def option_names(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(methods.METHODS[method])}


def reduced(model: nn.Module, method: str, **options) -> nn.Module:
    """The model patched; by mean scores where it has no class token; its learned parts, if any, as if trained."""
    options = options or METHODS[method]
    if "scores" in option_names(method) and not model.has_class_token:
        options = {"scores": "mean", **options}
    model = tokred.apply(model, method, **options)
    for block in model.blocks:
        if block.tokred_part is not None:
            randomised(block.tokred_part)
    return model


def keeping(method: str, *tokens: int, stages: tuple[int, ...] = (1, 3)) -> dict:
    """Options that leave so many patches in the stages, or of a method without stages as few in all blocks."""
    if "tokens" in option_names(method):
        return dict(tokens=list(tokens), stages=stages)
    return dict(r=10**6 if min(tokens) == 1 else 0)


def assert_same_forward(model: nn.Module, reference: nn.Module, x: Tensor) -> None:
    """Every entry point of two models in eval mode gives the same bits."""
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
        features = reference.forward_features(x)
        assert torch.equal(model.forward_features(x), features)
        assert torch.equal(model.forward_head(features, pre_logits=True), reference.forward_head(features, True))
        got, want = model.forward_intermediates(x), reference.forward_intermediates(x)
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def tome_oracle(model: nn.Module, x: Tensor, removed, prop_attn: bool = True, rounds: int = 1):
    """ToMe in float64 with explicit attention and plain loops, from the weights of an unpatched model.

    Args:
        rounds: how often a block may match again what it has merged, to remove more than half of its patches.

    Returns:
        (logits, source [B, N0], whether every choice was decided by more than 1e-5, above what a float32 model rounds).
    """
    model = copy.deepcopy(model).double().eval()
    p = model.num_prefix_tokens
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(x.double())))
        results = [_one_image(model, one, removed, p, prop_attn, rounds) for one in x]
        rows, sizes, source, clear = zip(*results, strict=True)
        rows, sizes = model.norm(torch.stack(rows)), torch.stack(sizes)
        return _head(model, rows, sizes), torch.stack(source), all(clear)


def _one_image(model, x: Tensor, removed, p: int, prop_attn: bool, rounds: int):
    size = torch.ones(len(x), dtype=torch.float64)
    source = torch.arange(len(x))
    clear = True
    for block, r in zip(model.blocks, removed, strict=True):
        y, k, _ = _attention(block, x, size if prop_attn else torch.ones_like(size))
        x = x + y
        keys = k.mean(0)
        for _ in range(rounds):
            now = max(0, min(r, (len(x) - p) // 2))
            if now:
                score, a, b = oracle.edge_scores(keys, p)
                clear = clear and oracle.decided(score, a, b, now, 1e-5)
                row = torch.from_numpy(oracle.match_image(score, len(x), p, now))
                member = torch.zeros(len(x) - now, len(x), dtype=torch.float64)
                member[row, torch.arange(len(x))] = size
                size = member.sum(1)
                x, keys = member @ x / size[:, None], member @ keys / size[:, None]
                source = row[source]
            r -= now
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size, source, clear


def _attention(block, x: Tensor, size: Tensor):
    """The branch [N, C], the keys [H, N, D] and the matrix [H, N, N]; a key of size s is s equal keys."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weight = (q @ k.mT / attn.head_dim**0.5).exp() * size
    p = weight / weight.sum(-1, keepdim=True)
    return block.ls1(attn.proj(attn.norm((p @ v).transpose(0, 1).flatten(1)))), k, p


def selection_oracle(model: nn.Module, x: Tensor, keep: dict, scores: str = "cls", fuse: str = "none"):
    """Top-K and EViT with explicit attention and plain loops, differentiable, in the dtype of the unpatched model.

    Args:
        keep: {block: patches to keep}.
        fuse: "none", "sum" or "mean".

    Returns:
        (logits, source [B, N0], whether every choice was decided by more than 1e-5 of the largest score).
    """
    p = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    results = [_select_one_image(model, one, keep, p, scores, fuse) for one in x]
    rows, source, clear = zip(*results, strict=True)
    return model.forward_head(model.norm(torch.stack(rows))), torch.stack(source), all(clear)


def _select_one_image(model, x: Tensor, keep: dict, p: int, scores: str, fuse: str):
    source = torch.arange(len(x))
    clear = True
    for index, block in enumerate(model.blocks):
        y, _, matrix = _attention(block, x, torch.ones(len(x), dtype=x.dtype))
        x = x + y
        k = keep.get(index, len(x))
        if k < len(x) - p:
            score = matrix[:, 0].mean(0) if scores == "cls" else matrix.mean((0, 1))
            order = sorted(range(p, len(x)), key=lambda j: (-score[j].item(), j))
            kept, rest = sorted(order[:k]), sorted(order[k:])
            clear = clear and bool(score[order[k - 1]] - score[order[k]] > 1e-5 * score.max())
            rows = [x[:p], x[kept]]
            where = torch.full((len(x),), -1)
            where[:p] = torch.arange(p)
            where[kept] = torch.arange(p, p + k)
            if fuse != "none":
                total = score[rest].sum() if fuse == "mean" else 1
                rows.append(sum(score[j] * x[j] for j in rest)[None] / total)
                where[rest] = p + k
            source = torch.where(source < 0, -1, where[source])
            x = torch.cat(rows)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, source, clear


def _head(model, x: Tensor, size: Tensor) -> Tensor:
    """The head on tokens written out as often as their size: merging changes nothing else there."""
    full = torch.stack([row.repeat_interleave(s.long(), 0) for row, s in zip(x, size, strict=True)])
    if model.global_pool == "":
        full = x
    return model.forward_head(full)


def assert_one_image_alone(run, x: Tensor) -> None:
    """Each image of a batch alone gives the same integers."""
    together = run(x)
    for n in range(len(x)):
        np.testing.assert_array_equal(run(x[n : n + 1])[0], together[n])
