"""What every method of the registry has in common: identity, counts, prefix, sources, ties, extremes, precision."""

import copy
from functools import partial

import pytest
import timm
import torch
import vits
from torch import nn
from vits import METHODS, SELECT, SOFT, assert_same_forward, images, option_names, pairs, reduced, tiny

import tokred_kernels as tokred

PAIRS = pairs("deit", "distilled", "cls-reg9", "gap-reg4-nocls", "no-prefix")


def traced(model, x):
    with torch.no_grad(), tokred.trace(model) as t:
        logits = model(x)
    return logits, t


def steps(model, x):
    """(x, size, assign) before and after each block; the first assign is None."""
    with torch.no_grad():
        x, size = model._embed(x), None
        found = [(x, size, None)]
        for block, r in zip(model.blocks, model._schedule(x), strict=True):
            x, size, assign = block(x, size, r, True)
            found.append((x, size, assign))
    return found


def transparent(model: nn.Module) -> nn.Module:
    """With branches of 0: a block changes tokens by its reduction alone."""
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            for p in layer.parameters():
                p.data.zero_()
    return model


def nothing_removed(method):
    """Options of a method under which nothing is removed."""
    names = option_names(method)
    if "r" in names:
        yield dict(r=0)
        yield dict(r=[0, 0])
    if "keep_rate" in names:
        yield dict(keep_rate=1, stages=(1, 3))
        yield dict(keep_rate=[1.0, 1], stages=(1, 2))
    if "tokens" in names:
        yield dict(tokens=[36, 99], stages=(1, 3))


@pytest.mark.parametrize(("name", "method"), [*PAIRS, *pairs("dinov2-reg4", "siglip-map", "qk_norm")])
def test_removing_nothing_is_timm_bit_for_bit(name, method):
    model = tiny(name)
    keys = list(model.state_dict())
    for options in nothing_removed(method):
        patched = reduced(copy.deepcopy(model), method, **options)
        assert "tokens" in options or list(patched.state_dict()) == keys  # nothing to learn either
        assert_same_forward(patched, model, images())


@pytest.mark.parametrize("side", [48, 40])
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_blocks_see_the_tokens_that_the_schedule_counts(name, method, side):
    model = reduced(tiny(name, img_size=side), method)
    seen = [{} for _ in model.blocks]

    def note(found, part, _module, args):
        found.setdefault(part, args[0].shape[1])  # MCTF projects twice: what it scores, then what it fused

    for found, block in zip(seen, model.blocks, strict=True):
        block.norm1.register_forward_pre_hook(partial(note, found, "attention"))
        block.mlp.register_forward_pre_hook(partial(note, found, "mlp"))
    _, t = traced(model, images(2, side))
    counts = tokred.schedule.tokens(model)
    assert [(found["attention"], found["mlp"]) for found in seen] == counts
    assert t.tokens[0] == (side // 8) ** 2 + model.num_prefix_tokens > t.tokens[-1]
    assert (t.counts <= torch.tensor(t.tokens)).all() and (t.counts > model.num_prefix_tokens).all()


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_reduction_keeps_the_prefix_and_says_where_every_token_went(name, method):
    model = transparent(reduced(tiny(name), method))
    p, N0 = model.num_prefix_tokens, 36 + model.num_prefix_tokens
    for (x, _, _), (out, size, assign) in zip(steps(model, images()), steps(model, images())[1:], strict=False):
        M = out.shape[1]
        assert torch.equal(out[:, :p], x[:, :p])
        if size is not None:
            assert size.dtype == torch.float32 and size.shape == out.shape[:2]
            assert (size >= 0).all() and torch.equal(size[:, :p], torch.ones(2, p))
        if method in ("tome", "mctf"):
            assert size is None or torch.equal(size.sum(1), torch.full((2,), float(N0)))
        if assign is None:
            assert torch.equal(out, x)
            continue
        assert assign.dtype == torch.int32 and assign.shape == x.shape[:2] and -1 <= assign.min() <= assign.max() < M
        assert torch.equal(assign[:, :p], torch.arange(p, dtype=torch.int32).expand(2, p))
        for n in range(2) if method not in SOFT else ():
            rows, members = assign[n][assign[n] >= 0].unique(return_counts=True)
            there = torch.arange(M) if size is None else size[n].nonzero().flatten()
            assert torch.equal(rows.long(), there), "every row has a member"
            fused = M - 1 if model.tokred_method.fuses else None
            for row in (row for row, count in zip(rows.tolist(), members, strict=True) if count == 1 and row != fused):
                assert torch.equal(out[n, row], x[n, assign[n] == row][0]), "a single member is copied"
            if method in SELECT:
                assert all(count == 1 for row, count in zip(rows.tolist(), members, strict=True) if row != fused)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_source_composes_the_assignments_and_tracing_changes_nothing(name, method):
    model = reduced(tiny(name), method)
    logits, t = traced(model, images())
    with torch.no_grad():
        assert torch.equal(model(images()), logits)
    N0 = t.tokens[0]
    matrix = torch.eye(N0).expand(2, -1, -1)  # the source matrix of the paper: rows now, columns then
    for assign, M in zip(t.assign, t.tokens[1:], strict=True):
        if assign is not None:
            rows = torch.where(assign < 0, M, assign).long()
            matrix = torch.zeros(2, M + 1, assign.shape[1]).scatter(1, rows[:, None], 1)[:, :M] @ matrix
    assert torch.equal(t.source.long(), torch.where(matrix.sum(1) > 0, matrix.argmax(1), -1))


@pytest.mark.parametrize(("name", "method"), pairs("deit", "gap-reg4-nocls", "siglip-map"))
def test_an_image_alone_is_reduced_as_in_its_batch(name, method):
    model = reduced(tiny(name), method)
    together, t = traced(model, images(3))
    for n, image in enumerate(images(3)):
        alone, one = traced(model, image[None])
        assert torch.equal(one.source[0], t.source[n]) and torch.equal(one.counts[0], t.counts[n])
        torch.testing.assert_close(alone[0], together[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [8, 16, 40])
@pytest.mark.parametrize(("name", "method"), pairs("distilled", "gap-reg4-nocls"))
def test_one_patch_is_left_at_least(name, method, side):
    """Of 1, 4 and 25 patches: as many as there are, then one."""
    P = (side // 8) ** 2
    model = reduced(tiny(name, img_size=side), method, **vits.keeping(method, P, 1))
    logits, t = traced(model, images(2, side))
    assert logits.isfinite().all()
    p = model.num_prefix_tokens
    left = t.tokens[-1] - p
    most = max(4 if method == "radial" else 1 + model.tokred_method.fuses, min(P, vits.LEAST.get(method, 0) - p))
    assert 1 <= left <= most
    assert torch.equal(traced(model, images(0, side))[0], logits[:0])


# GMACs of DeiT-S at keep rates 0.9, 0.7, 0.5, 0.25 of all patches, as "Which Tokens to Use?" counts them: methods that
# reduce before a block, and those that do so in it.
BEFORE, INSIDE = (3.91, 2.88, 2.15, 1.56), (3.96, 2.98, 2.28, 1.70)
GMACS = {
    **dict.fromkeys(("dynamicvit", "kmedoids", "dpcknn", "sit", "patchmerger", "sinkhorn"), BEFORE),
    **dict.fromkeys(("tome", "topk", "ats"), INSIDE),
}
MCTF = [  # model, r, GMACs without the matching
    ("deit_tiny_patch16_224", 16, 0.697),
    ("deit_small_patch16_224", 16, 2.577),
    ("deit_tiny_patch16_224", 0.35, 0.742),
    ("deit_small_patch16_224", 0.35, 2.744),
]


@pytest.mark.parametrize("method", GMACS)
def test_macs_of_the_published_stages(method):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    for keep_rate, published in zip((0.9, 0.7, 0.5, 0.25), GMACS[method], strict=True):
        macs = tokred.schedule.macs(model, method=method, keep_rate=keep_rate)
        assert macs / 1e9 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("name", "r", "published"), MCTF)
def test_macs_of_mctf_as_published(name, r, published):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert tokred.schedule.macs(model, method="mctf", r=r) / 1e9 == pytest.approx(published, rel=0.005)


def degenerate(kind, dtype):
    """A model whose tokens tie: their keys are equal, and patches are all 0, all equal, or equal in pairs."""
    model = transparent(tiny("deit"))
    for block in model.blocks:
        block.attn.qkv.weight.data.zero_()
        block.attn.qkv.bias.data.fill_(0.5)
    model.pos_embed.data.zero_()
    model.patch_embed.proj.weight.data.mul_(kind == "pairs")
    model.patch_embed.proj.bias.data.mul_(kind != "zero")
    x = images()
    x[..., 8:16] = x[..., :8]  # the first two patches of each row of the grid
    return model.to(dtype), x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "kind"),
    # The cosine of two equal tokens is 1 up to rounding: pairs are nearly tied for MCTF, not exactly.
    [(m, kind) for m in METHODS for kind in ("zero", "equal", "pairs") if (m, kind) != ("mctf", "pairs")],
)
def test_ties_fall_the_same_way_everywhere(method, kind, dtype):
    model, x = degenerate(kind, dtype)
    model = reduced(model, method).to(dtype)
    with tokred.use_backend("reference"):
        want = traced(model, x)[1]
    logits, t = traced(model, x)
    assert logits.isfinite().all()
    assert torch.equal(t.source, want.source) and torch.equal(t.counts, want.counts)
    if kind != "pairs":
        assert torch.equal(t.source[0], t.source[1])


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"evit", "metr", "sinkhorn"}))
def test_equal_patches_stay_equal(method):
    """Not under sums that are not averages: EViT's fused token, Sinkhorn's rows."""
    model = reduced(tiny("gap" if method not in vits.NEEDS_CLASS_TOKEN else "deit"), method)
    for p in (model.pos_embed, model.patch_embed.proj.weight):
        p.data.zero_()
    with torch.no_grad():
        x = model.forward_features(images())[:, model.num_prefix_tokens :]
    torch.testing.assert_close(x, x[:, :1].expand_as(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "method"), pairs("deit", "gap-reg4-nocls"))
def test_half_models_and_autocast_decide_and_count_in_float32(name, method, dtype):
    model = reduced(tiny(name), method)
    with torch.no_grad():
        want, t = traced(model, images())
        half = copy.deepcopy(model).to(dtype)
        got, u = traced(half, images().to(dtype))
        size = half._reduce(images().to(dtype), None, False)[1]
        with torch.autocast("cpu", dtype=dtype):
            mixed, v = traced(model, images())
    assert got.dtype == dtype and (size is None or size.dtype == torch.float32)
    assert t.tokens == u.tokens == v.tokens
    for other in (got.float(), mixed.float()):  # half precision may keep other patches
        assert (other - want).abs().max() < 0.5 * want.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_writes_nothing(method):
    """No parameter, buffer or attribute changes, in eval mode and in training."""
    model = reduced(tiny("deit"), method)

    def state():
        return {name: (t.clone(), t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]}

    before, attributes = state(), [set(vars(m)) for m in model.modules()]
    for training in (False, True):
        model.train(training)
        model(images())
        after = state()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n][0], t) and after[n][1] == v for n, (t, v) in before.items())
        assert [set(vars(m)) for m in model.modules()] == attributes


LEARNED = {"dynamicvit", "sit", "patchmerger", "sinkhorn", "dpcknn"} & METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_learned_trains(method):
    model = tokred.apply(tiny("deit"), method, **METHODS[method]).train()
    learned = {n: p for n, p in model.named_parameters() if ".tokred_part." in n}
    assert bool(learned) == (method in LEARNED)
    torch.manual_seed(0)
    model(images()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for n, p in learned.items() if p.dim() > 1), "every weight matrix has a gradient"
