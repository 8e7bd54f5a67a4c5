"""What a patched model hands out besides logits: dense outputs on the full grid, features for its head."""

import itertools

import pytest
import torch
from vits import images, pairs, reduced, tiny

import tokred_kernels as tokred


def patched(name="deit", r=5, **options):
    return tokred.apply(tiny(name, **options), "tome", r=r)


def manual_grids(model, x, norm):
    """[B, N0, C] after each block, every token with the value of its row."""
    with torch.no_grad():
        rows, size = model._embed(x), None
        grids, source = [], torch.arange(rows.shape[1]).expand(len(x), -1)
        for block, r in zip(model.blocks, model._schedule(rows), strict=True):
            rows, size, assign = block(rows, size, r, True)
            if assign is not None:
                source = torch.where(source < 0, -1, assign.long().gather(1, source.clamp(min=0)))
            y = model.norm(rows) if norm else rows
            grid = y.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, y.shape[2]))
            grids.append(grid.masked_fill(source[..., None] < 0, 0))
    return grids


@pytest.mark.parametrize(("name", "method"), [("gap", "evit"), ("gap", "topk"), *pairs("dinov2-reg4", "distilled")])
def test_dense_outputs_give_dropped_tokens_0_and_fused_ones_the_fused_token(name, method):
    model = reduced(tiny(name), method)
    with tokred.trace(model) as t, torch.no_grad():
        final, grids = model.forward_intermediates(images(), output_fmt="NLC")
    want, p = manual_grids(model, images(), False), model.num_prefix_tokens
    assert all(torch.equal(got, grid[:, p:]) for got, grid in zip(grids, want, strict=True))
    assert torch.equal(final, manual_grids(model, images(), True)[-1])
    assert ((final == 0).all(2) == (t.source < 0)).all()
    assert t.in_fused.any() == model.tokred_method.fuses


INDICES = [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 2], [0, 2])]
FLAGS = ("norm", "stop_early", "intermediates_only", "output_dict", "return_prefix_tokens")


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=len(FLAGS))), ids=str)
@pytest.mark.parametrize("name", ["deit", "dinov2-reg4", "gap"])
def test_forward_intermediates_gives_the_full_grid_under_all_options(name, flags):
    options = dict(zip(FLAGS, flags, strict=True))
    model, dense, x = patched(name, r=[0, 5, 0, 3]), tiny(name), images()
    p = model.num_prefix_tokens
    expected = {norm: manual_grids(model, x, norm) for norm in (False, True)}
    for (indices, taken), output_fmt in itertools.product(INDICES, ("NCHW", "NLC")):
        with torch.no_grad():
            got = model.forward_intermediates(x, indices, output_fmt=output_fmt, **options)
            like = dense.forward_intermediates(x, indices, output_fmt=output_fmt, **options)
        assert shapes(got) == shapes(like)
        grids, prefixes, final = take_apart(got, p, options)
        for n, index in enumerate(taken):
            want = expected[options["norm"]][index]
            flat = grids[n].flatten(2).transpose(1, 2) if output_fmt == "NCHW" else grids[n]
            assert torch.equal(flat, want[:, p:])
            assert prefixes is None or torch.equal(prefixes[n], want[:, :p])
        if final is not None:
            assert torch.equal(final, expected[True][taken[-1] if options["stop_early"] else 3])


def shapes(results):
    """The structure of results, with shapes for tensors."""
    if isinstance(results, dict):
        return {key: shapes(value) for key, value in results.items()}
    return results.shape if isinstance(results, torch.Tensor) else [type(results), *map(shapes, results)]


def take_apart(results, p, options):
    """(grids, prefixes or None, final or None) of what forward_intermediates returns."""
    final = prefixes = None
    if options["output_dict"]:
        names = ("image_intermediates", "image_intermediates_prefix", "image_features")
        return tuple(results.get(name) for name in names)
    if not options["intermediates_only"]:
        final, results = results
    if options["return_prefix_tokens"] and p:
        results, prefixes = zip(*results, strict=True)
    return results, prefixes, final


def test_get_intermediate_layers():
    model = patched("dinov2-reg4")
    with torch.no_grad():
        got = model.get_intermediate_layers(images(), 2, reshape=True, return_prefix_tokens=True, norm=True)
        want = model.forward_intermediates(images(), 2, return_prefix_tokens=True, norm=True, intermediates_only=True)
    assert len(got) == 2 and got[0][0].shape == (2, 32, 6, 6) and got[0][1].shape == (2, 5, 32)
    assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", ["deit", "distilled", "gap", "avgmax", "max", "siglip-map", "prr-avg", "no-pool"])
def test_forward_head_alone(name):
    """Pooled heads refuse reduced tokens without sizes, take them with sizes, and take unmerged tokens."""
    model = patched(name)
    with torch.no_grad():
        want = model(images())
        features, size = model._reduce(images(), None, False)
        assert torch.equal(model.forward_features(images()), features)
        torch.testing.assert_close(model.forward_head(features, size=size), want)
        if name in ("gap", "avgmax", "siglip-map", "prr-avg"):
            with pytest.raises(ValueError, match=r"forward_head: \w+ pooling must weigh reduced tokens"):
                model.forward_head(features)
        else:
            assert torch.equal(model.forward_head(features), want)
        if name != "no-pool":
            full = model.forward_intermediates(images())[0]
            torch.testing.assert_close(model.forward_head(full), want, rtol=1e-4, atol=1e-4)


def test_forward_head_alone_is_refused_where_the_full_count_is_unknown():
    """64 patches of a larger image, reduced to the 36 that an image of the default size has."""
    model = patched("gap", r=7, dynamic_img_size=True)
    with torch.no_grad():
        features = model.forward_features(images(2, 64))
        assert features.shape[1] == model.patch_embed.num_patches
        with pytest.raises(ValueError, match="pass size="):
            model.forward_head(features)


@pytest.mark.parametrize(
    ("method", "options"),
    [("tome", dict(tokens=[9], stages=(1,))), ("mctf", dict(r=100)), ("ats", dict(tokens=[9], stages=(1,)))],
)
def test_a_head_without_sizes_refuses_tokens_too_few_to_be_reduced_again(method, options):
    model = tokred.apply(tiny("avgmax"), method, **options)
    with torch.no_grad(), pytest.raises(ValueError, match="must weigh reduced tokens by their size"):
        model.forward_head(model.forward_features(images()))
