"""Radial: its rings counted in integers, and what a model computes on them."""

import copy
import io
import re
from fractions import Fraction

import pytest
import torch
import vits
from vits import TINY, assert_same_forward, images, tiny

import tokred_kernels as tokred
from tokred_kernels.methods.radial import METRICS

DISTANCE = {
    "l1": lambda y, x: abs(y) + abs(x),
    "l2": lambda y, x: y * y + x * x,
    "linf": lambda y, x: max(abs(y), abs(x)),
}
PUBLISHED = {  # patches in the stages of 14 x 14, by keep rate
    "l1": {0.9: [172, 156, 136], 0.7: [136, 84, 60], 0.5: [84, 40, 24], 0.25: [40, 12, 4]},
    "l2": {0.9: [176, 156, 140], 0.7: [140, 96, 68], 0.5: [96, 52, 24], 0.25: [52, 12, 4]},
    "linf": {0.9: [196, 144, 144], 0.7: [144, 100, 64], 0.5: [100, 36, 16], 0.25: [36, 16, 4]},
}


def ring(rows, columns, metric, target):
    """The patches of the ring set whose count is closest to the target; exact, from the centre in patches."""
    centre_y, centre_x = Fraction(rows - 1, 2), Fraction(columns - 1, 2)
    found = {(y, x): DISTANCE[metric](y - centre_y, x - centre_x) for y in range(rows) for x in range(columns)}
    sets = [[y * columns + x for (y, x), d in found.items() if d <= limit] for limit in sorted(set(found.values()))]
    return min(sets, key=lambda kept: abs(len(kept) - target))  # of two the first, the smaller


def traced(model, x):
    with torch.no_grad(), tokred.trace(model) as t:
        logits = model(x)
    return logits, t


def sliced(model, x, kept):
    """The model in float64 with the patches of `kept[block]` (numbers on the grid) alone entering that block."""
    model = copy.deepcopy(model).double()
    p = model.num_prefix_tokens
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(x.double())))
        here = list(range(x.shape[1] - p))
        for index, block in enumerate(model.blocks):
            if index in kept:
                rows = [here.index(patch) for patch in kept[index]]
                x, here = torch.cat([x[:, :p], x[:, p:][:, rows]], 1), kept[index]
            x = block(x)
        return model.forward_head(model.norm(x)), here


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("keep_rate", [0.9, 0.7, 0.5, 0.25])
def test_counts_of_deit(metric, keep_rate):
    model = tiny("deit", img_size=112, depth=10)  # 14 x 14 patches
    counts = tokred.schedule.tokens(model, method="radial", keep_rate=keep_rate, metric=metric)
    want = [n + 1 for stage in PUBLISHED[metric][keep_rate] for n in [stage] * 3]
    assert counts == [(n, n) for n in [197] * 3 + want[:7]]


def test_the_contiguous_mode_of_the_docstring_is_the_published_one():
    """Over blocks 3 to 9 the radius falls linearly from the corner's, 13 sqrt(2), to the centre's, both left out."""
    radius = [13 - Fraction(12 * (i + 1), 8) for i in range(7)]
    corner = [(2 * i - 13) ** 2 + (2 * j - 13) ** 2 for i in range(14) for j in range(14)]
    tokens = [sum(d <= 2 * r * r for d in corner) for r in radius]
    assert f"tokens={tokens}" in tokred.methods.METHODS["radial"].__doc__
    model = tiny("deit", img_size=112, depth=10)
    counts = tokred.schedule.tokens(model, method="radial", stages=range(3, 10), tokens=tokens)
    assert [n for n, _ in counts] == [197] * 3 + [n + 1 for n in tokens]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", TINY)
def test_both_modes_are_the_model_on_its_rings(name, metric):
    model = tiny(name)
    kept = {1: ring(6, 6, metric, 25), 3: ring(6, 6, metric, 9)}
    want, here = sliced(model, images(), kept)
    p = model.num_prefix_tokens
    for mode in ("drop", "mask"):
        patched = tokred.apply(copy.deepcopy(model), "radial", stages=(1, 3), tokens=[25, 9], metric=metric, mode=mode)
        got, t = traced(patched, images())
        if model.global_pool:
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * want.abs().max().item())
        alive = (t.source[0] >= 0).nonzero().flatten().tolist()
        assert alive == [*range(p), *(p + n for n in here)] and torch.equal(t.source[0], t.source[1])
        assert t.counts.tolist() == [[p + 36] * 2 + [p + len(kept[1])] * 2 + [p + len(here)]] * 2
        assert t.tokens == (t.counts[0].tolist() if mode == "drop" else [p + 36] * 5)


@pytest.mark.parametrize("size", [(48, 64), (40, 24), (8, 8)], ids=str)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_any_grid_has_rings(size, mode):
    model = tiny("distilled", img_size=size)
    rows, columns = size[0] // 8, size[1] // 8
    x = torch.randn(2, 3, *size)
    tokens = [min(11, rows * columns), 1]
    want, _ = sliced(model, x, {n: ring(rows, columns, "l2", k) for n, k in zip((0, 2), tokens, strict=True)})
    tokred.apply(model, "radial", stages=(0, 2), tokens=tokens, mode=mode)
    torch.testing.assert_close(traced(model, x)[0].double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["deit", "gap", "max", "no-prefix"])
def test_keeping_everything_is_timm_bit_for_bit(name):
    model = tiny(name)
    for options in (dict(keep_rate=1), dict(keep_rate=[1, 0.99], metric="linf"), dict(keep_rate=1, mode="mask")):
        assert_same_forward(tokred.apply(copy.deepcopy(model), "radial", stages=(1, 3), **options), model, images())


def test_masked_patches_influence_nothing():
    """Whatever finite values they hold when they are masked."""
    model = tokred.apply(tiny("avgmax"), "radial", stages=(1,), tokens=[16], mode="mask")
    want, t = traced(model, images())
    outside, noise = t.source[0] < 0, 100 * torch.randn(2, 37, 32)

    def poison(_block, args, kwargs):
        return (torch.where(outside[:, None], noise, args[0]), *args[1:]), kwargs

    model.blocks[1].register_forward_pre_hook(poison, with_kwargs=True)
    assert torch.equal(model(images()), want)


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_gradients_are_those_of_the_rings(mode):
    model = tiny("qk_norm").double()
    twin = copy.deepcopy(model)
    p = model.num_prefix_tokens
    rows = [*range(p), *(p + n for n in ring(6, 6, "l1", 20))]
    x = twin._pos_embed(twin.patch_embed(images().double()))
    for block in twin.blocks[:2]:
        x = block(x)
    x = x[:, rows]
    for block in twin.blocks[2:]:
        x = block(x)
    twin.forward_head(twin.norm(x)).square().sum().backward()
    tokred.apply(model, "radial", stages=(2,), tokens=[20], metric="l1", mode=mode)
    model.train()(images().double()).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_the_same_rings(mode, dtype):
    model = tokred.apply(tiny("siglip-map"), "radial", keep_rate=0.7, stages=(0, 2), mode=mode)
    want, t = traced(model, images())
    got, half = traced(model.to(dtype), images().to(dtype))
    assert got.dtype == dtype and torch.equal(half.source, t.source)
    assert (got.float() - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_compile_export_save_and_state_dict(mode):
    model = tiny("gap-reg4-nocls", depth=2)
    keys = list(model.state_dict())
    tokred.apply(model, "radial", keep_rate=0.7, stages=(0, 1), mode=mode)
    assert list(model.state_dict()) == keys  # rings are constants of the grid
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(images(3))
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images(3)), want)
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        torch.testing.assert_close(program.module()(images(3)), want)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(traced(torch.load(buffer, weights_only=False), images(3))[0], want)
    tokred.remove(model)
    assert not list(model.blocks.buffers())


BAD = {
    "metric": (dict(metric="l3"), "radial: metric must be one of l1, l2, linf, got 'l3'"),
    "mode": (dict(mode="zero"), "radial: mode must be one of drop, mask, got 'zero'"),
    "r": (dict(r=5), "apply: radial has no option 'r'; it takes keep_rate, stages, rule, tokens, metric, mode"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokred.apply(tiny("deit"), "radial", keep_rate=0.7, stages=(1,), **options)


def test_models_without_a_fixed_grid_are_refused():
    apply = lambda model: tokred.apply(model, "radial", keep_rate=0.7, stages=(1,))  # noqa: E731
    with pytest.raises(ValueError, match=r"^radial: rings need a fixed grid, and the model takes images of any size$"):
        apply(tiny("deit", dynamic_img_size=True))
    with pytest.raises(ValueError, match=r"^radial: rings need the whole grid, and the model drops patches"):
        apply(tiny("deit", patch_drop_rate=0.5))
    model = apply(tiny("gap"))
    model.set_input_size(64)
    with pytest.raises(ValueError, match=r"^radial: applied to a grid of 36 patches, got 64; remove\(\) it first$"):
        model(images(1, 64))
    with torch.no_grad():
        apply(tokred.remove(model))(images(1, 64))


@pytest.mark.parametrize("name", ["gap", "max", "avgmax", "prr-avg"])
def test_a_head_without_sizes_does_not_pool_masked_patches(name):
    model = tokred.apply(tiny(name), "radial", keep_rate=0.5, stages=(1,), mode="mask")
    with torch.no_grad():
        features = model.forward_features(images())
        with pytest.raises(ValueError, match="must weigh reduced tokens by their size"):
            model.forward_head(features)
        assert torch.equal(model.forward_head(features, size=model._reduce(images(), None, False)[1]), model(images()))


def test_the_pattern_is_one_for_every_image():
    model = tokred.apply(tiny("deit"), "radial", keep_rate=0.5, stages=(1, 2))
    vits.assert_one_image_alone(lambda x: traced(model, x)[1].source.numpy(), images(3))
