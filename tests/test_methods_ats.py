"""ATS: the sampler in exact fractions, and what a model computes with the patches that are sampled."""

import copy
import re
from fractions import Fraction

import pytest
import torch
import vits
from hypothesis import given, settings
from hypothesis import strategies as st
from vits import TINY, assert_same_forward, images, tiny

import tokred_kernels as tokred
from tokred_kernels.methods.ats import sample

CLASSED = [name for name in TINY if tiny(name).has_class_token]


def sampled(score, n, alive=None):
    """Patches that n points pick, ascending, and how clear the closest choice is, in float64 from fractions."""
    total = sum(map(Fraction, score)) + Fraction(1e-6)
    end, ends = Fraction(0), []
    for s in score:
        end += Fraction(s) / total
        ends.append(end)
    picked, margin = set(), 1.0
    for t in range(n):
        point = Fraction(2 * t + 1, 2 * (n + 1))
        gaps = sorted((abs(e - point), j) for j, e in enumerate(ends) if alive is None or alive[j])
        picked.add(gaps[0][1])
        if len(gaps) > 1:
            margin = min(margin, float(gaps[1][0] - gaps[0][0]))
    return sorted(picked), margin


def ats_oracle(model, x, points):
    """ATS with explicit attention and a list of tokens for each image, without padding, in float64.

    Args:
        points: {block: n}.

    Returns:
        (the rows of each image, source [B, N0], whether every choice was decided by more than 1e-6).
    """
    model = copy.deepcopy(model).double().eval()
    p = model.num_prefix_tokens
    rows, sources, clear = [], [], True
    for one in model.norm_pre(model._pos_embed(model.patch_embed(x.double()))):
        source = torch.arange(len(one))
        for index, block in enumerate(model.blocks):
            branch, _, matrix = vits._attention(block, one, torch.ones(len(one), dtype=one.dtype))
            if index in points:  # always sampled, also where fewer patches are left than there are points
                v = block.attn.qkv(block.norm1(one)).view(len(one), 3, block.attn.num_heads, -1)[:, 2]
                score = torch.einsum("hn,nh->n", matrix[:, 0], v.norm(dim=-1))
                picked, margin = sampled(score[p:].tolist(), points[index])
                clear = clear and margin > 1e-6
                kept = [*range(p), *(p + j for j in picked)]
                where = torch.full((len(one),), -1)
                where[kept] = torch.arange(len(kept))
                source = torch.where(source < 0, -1, where[source])
                one, branch = one[kept], branch[kept]
            one = one + branch
            one = one + block.ls2(block.mlp(block.norm2(one)))
        rows.append(model.norm(one))
        sources.append(source)
    return rows, torch.stack(sources), clear


def traced(model, x):
    with torch.no_grad(), tokred.trace(model) as t:
        logits = model(x)
    return logits, t


@pytest.mark.parametrize("name", CLASSED)
def test_agrees_with_the_float64_oracle(name):
    """Every image as if it were alone and had no rows to spare."""
    model = tiny(name)
    p = model.num_prefix_tokens
    with torch.no_grad():
        rows, source, clear = ats_oracle(model, images(3), {1: 32, 3: 30})
        assert clear, "the seed leaves a choice to rounding"
        want = (
            torch.cat([copy.deepcopy(model).double().forward_head(one[None]) for one in rows])
            if model.global_pool
            else None
        )
    assert any(len(one) < p + 30 for one in rows), "without rows to spare"
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        patched = tokred.apply(copy.deepcopy(model).to(dtype), "ats", stages=(1, 3), tokens=[32, 30])
        got, t = traced(patched, images(3).to(dtype))
        assert torch.equal(t.source.long(), source) and t.tokens == [p + 36] * 2 + [p + 32] * 2 + [p + 30]
        assert t.counts[:, -1].tolist() == [len(one) for one in rows]
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


SCORES = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e30]))


@settings(deadline=None, max_examples=200)
@given(st.lists(SCORES, min_size=2, max_size=24), st.integers(1, 30), st.integers(0, 5), st.randoms())
def test_the_sampler_picks_the_nearest_ends(score, n, prefix, random):
    n = min(n, len(score) - 1)
    alive = [random.random() < 0.8 for _ in score]
    alive[random.randrange(len(score))] = True
    for mask in (None, alive):
        s = [x if mask is None or mask[j] else 0.0 for j, x in enumerate(score)]  # attention's score of masked tokens
        want, margin = sampled(s, n, mask)
        size = None if mask is None else torch.tensor([[1.0] * prefix + mask]).float()
        source, assign = sample(torch.tensor([[9.0] * prefix + s]), size, prefix, n)
        kept = [j - prefix for j in source[0, prefix:].tolist() if j]
        assert source.dtype == assign.dtype == torch.int32 and source.shape == (1, prefix + n)
        assert source[0, :prefix].tolist() == list(range(prefix))
        rows = {j: row for row, j in enumerate(source[0].tolist()) if row < prefix + (assign[0] >= 0).sum() - prefix}
        assert all(assign[0, j] == row for j, row in rows.items())
        assert (assign[0] < 0).sum() == prefix + len(s) - len(rows)
        if margin > 1e-6 and prefix:
            assert kept == want


@pytest.mark.parametrize("n", [3, 7, 12, 14, 19, 27, 48, 98, 137])
def test_equal_scores_keep_equal_steps(n):
    """As many as there are points, also where a grid of floats has one too many: nothing is lost to rounding."""
    _, assign = sample(torch.full((1, 197), 1.0), None, 1, n)
    want, _ = sampled([1.0] * 196, n)
    assert len(want) == n and (assign[0, 1:] >= 0).nonzero().flatten().tolist() == want


def test_ties_fall_to_the_lower_index():
    """Ends 1/2, 1/2, 1 and the point 1/2; then a point halfway between the ends 1/4 and 3/4."""
    big = 2.0**60  # beside which 1e-6 is nothing
    assert sample(torch.tensor([[0.0, big, 0.0, big]]), None, 1, 1)[1].tolist() == [[0, 1, -1, -1]]
    assert sample(torch.tensor([[0.0, big, 2 * big, big]]), None, 1, 1)[1].tolist() == [[0, 1, -1, -1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 3e38])
def test_any_scores_give_rows_in_range(value):
    source, assign = sample(torch.full((2, 9), value), None, 1, 5)
    assert source.min() >= 0 and source.max() < 9 and (assign[:, 0] == 0).all()
    assert (assign >= 0).sum(1).tolist() == [(source[n, 1:] > 0).sum() + 1 for n in range(2)]


def test_a_score_of_nan_counts_as_0():
    score = torch.rand(1, 12, generator=torch.Generator().manual_seed(0))
    zero = score.clone()
    score[0, [2, 7]], zero[0, [2, 7]] = torch.nan, 0
    assert torch.equal(sample(score, None, 1, 6)[1], sample(zero, None, 1, 6)[1])


@pytest.mark.parametrize("name", ["deit", "distilled", "max"])
def test_keeping_everything_is_timm_bit_for_bit(name):
    model = tiny(name)
    assert_same_forward(tokred.apply(copy.deepcopy(model), "ats", keep_rate=1, stages=(1, 3)), model, images())


@pytest.mark.parametrize("name", ["distilled", "avgmax", "max", "prr-token", "dinov2-reg4"])
def test_rows_to_spare_influence_nothing(name):
    model = tokred.apply(tiny(name), "ats", stages=(1, 2), tokens=[30, 20])
    want, t = traced(model, images(4))
    assert (t.counts[:, -1] < t.tokens[-1]).any()

    def disturb(_block, args, kwargs):
        x, size, *rest = args
        return (torch.where(size[..., None] > 0, x, 100 * torch.randn(x.shape)), size, *rest), kwargs

    for block in model.blocks[2:]:
        block.register_forward_pre_hook(disturb, with_kwargs=True)
    with torch.no_grad():
        assert torch.equal(model(images(4)), want)
    vits.assert_one_image_alone(lambda x: traced(model, x)[1].source.numpy(), images(4))


def test_gradients_are_those_of_the_kept_tokens():
    """One image with a single stage: against the oracle's rows, the selection itself without gradient."""
    model = tiny("qk_norm").double()
    twin, p = copy.deepcopy(model), model.num_prefix_tokens
    x = images(1).double()
    tokred.apply(model, "ats", stages=(2,), tokens=[30])
    model.train()
    with tokred.trace(model) as t:
        model(x).square().sum().backward()
    kept = (t.source[0] >= 0).nonzero().flatten()
    assert len(kept) < p + 30
    y = twin._pos_embed(twin.patch_embed(x))
    for index, block in enumerate(twin.blocks):
        branch = vits._attention(block, y[0], torch.ones(y.shape[1], dtype=y.dtype))[0][None]
        if index == 2:
            y, branch = y[:, kept], branch[:, kept]
        y = y + branch
        y = y + block.ls2(block.mlp(block.norm2(y)))
    twin.forward_head(twin.norm(y)).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_score_in_float32(dtype):
    model = tokred.apply(tiny("deit3"), "ats", keep_rate=0.7, stages=(0, 2))
    want, t = traced(model, images())
    got, half = traced(model.to(dtype), images().to(dtype))
    assert got.dtype == dtype and half.tokens == t.tokens
    assert (got.float() - want).abs().max() < 0.5 * want.abs().max()


def test_heads_that_our_attention_does_not_take_are_padded():
    model = tiny("deit", embed_dim=24)  # heads of width 12
    _, source, clear = ats_oracle(model, images(), {1: 15})
    assert clear and torch.equal(
        traced(tokred.apply(model, "ats", stages=(1,), tokens=[15]), images())[1].source.long(), source
    )


def test_compile_and_export():
    model = tokred.apply(tiny("distilled", depth=3), "ats", keep_rate=0.7, stages=(0, 1))
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(images(3))
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images(3)), want)
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        torch.testing.assert_close(program.module()(images(3)), want)


@pytest.mark.parametrize("name", ["gap", "gap-reg4-nocls"])
def test_a_model_without_a_class_token_is_refused(name):
    with pytest.raises(ValueError, match=r"^ats: the model has no class token to score by$"):
        tokred.apply(tiny(name), "ats", keep_rate=0.5, stages=(1,))


def test_what_others_take_is_refused():
    message = "apply: ats has no option 'scores'; it takes keep_rate, stages, rule, tokens"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokred.apply(tiny("deit"), "ats", keep_rate=0.5, stages=(1,), scores="mean")


def test_dense_outputs_are_0_where_nothing_was_kept():
    model = tokred.apply(tiny("deit"), "ats", keep_rate=0.5, stages=(1,))
    _, t = traced(model, images())
    with torch.no_grad():
        final, _ = model.forward_intermediates(images())
    gone = t.source < 0
    assert gone.any() and (final[gone] == 0).all() and (final[~gone] != 0).any(1).all()
