"""MCTF: models against a float64 form that holds every attention map, and what the method promises."""

import copy
import io
import re

import oracle
import pytest
import torch
import vits
from hypothesis import given, settings
from hypothesis import strategies as st
from vits import TINY, assert_same_forward, images, tiny

import tokred_kernels as tokred
from tokred_kernels.methods import create

DEFAULTS = dict(mode=1, pooling=1, t_sim=1.0, t_info=20.0, t_size=40.0, two_way=True, prop_attn=True)


def plan(x, matrix, s, r, p, o):
    """assign [N] as a matrix M [m, N] of 0 and 1, the weights w [N], and whether the choice was clear."""
    a = matrix.detach().mean((0, 1))
    h, z = 1 / (a + 1e-6), 1 / s
    weight = (h / h.max()) ** (1 / o["t_info"] if o["t_info"] else 0)
    weight = weight * (z / z.max()) ** (1 / o["t_size"] if o["t_size"] else 0)
    score, keys_a, keys_b = oracle.edge_scores(x.detach(), p, weight, 1 / o["t_sim"] if o["t_sim"] else 0)
    form = "match_image_two_way" if o["two_way"] else "match_image"
    clear = (oracle.decided_two_way if o["two_way"] else oracle.decided)(score, keys_a, keys_b, r, 1e-5)
    row = torch.from_numpy(getattr(oracle, form)(score, len(x), p, r))
    M = torch.zeros(len(x) - r, len(x), dtype=x.dtype)
    M[row, torch.arange(len(x))] = 1
    w = {0: s, 1: a * s, 2: torch.ones_like(s), 3: torch.ones_like(s)}[o["pooling"]]
    return M, row, w, clear


def pooled(M, values, w, largest):
    """Rows of values [..., N, C] by their members."""
    if largest:
        return torch.stack([values[..., members.bool(), :].amax(-2) for members in M], -2)
    return (M * w) @ values / (M @ w)[:, None]


def one_image(model, x, removed, o):
    s, source, clear = torch.ones(len(x), dtype=x.dtype), torch.arange(len(x)), True
    for block, r in zip(model.blocks, removed, strict=True):
        attn = block.attn
        branch, _, A = vits._attention(block, x, s if o["prop_attn"] else torch.ones_like(s))
        if r == 0 or o["mode"] == 0:
            x = x + branch
            x = x + block.ls2(block.mlp(block.norm2(x)))
        if r == 0:
            continue
        M, row, w, decided = plan(x, A, s, r, model.num_prefix_tokens, o)
        clear, source = clear and decided, row[source]
        x, s = pooled(M, x, w, o["pooling"] == 2), M @ s
        if o["mode"] == 2:
            x = x + vits._attention(block, x, s if o["prop_attn"] else torch.ones_like(s))[0]
        if o["mode"] == 1:
            fused = pooled(M, A @ M.T, w, o["pooling"] == 2)
            v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, attn.head_dim)[:, 2].transpose(0, 1)
            x = x + block.ls1(attn.proj(attn.norm((fused @ v).transpose(0, 1).flatten(1))))
        if o["mode"] > 0:
            x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, s, source, clear


def mctf_oracle(model, x, removed, **options):
    """(logits, source [B, N0], whether every choice was decided by more than 1e-5); differentiable."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    rows, sizes, source, clear = zip(*(one_image(model, one, removed, DEFAULTS | options) for one in x), strict=True)
    return vits._head(model, model.norm(torch.stack(rows)), torch.stack(sizes)), torch.stack(source), all(clear)


def clear_case(model, **options):
    """The first images of which no choice is left to rounding, and the oracle's logits and source."""
    for seed in range(1, 9):
        x = images(seed=seed)
        want, source, clear = mctf_oracle(model, x.double(), REMOVED, **options)
        if clear:
            return x, want, source
    raise AssertionError("every seed leaves a choice to rounding")


def options_of(o):
    names = {"mode": "one_step_ahead", "two_way": "bidirectional"}
    return {names.get(name, name): value for name, value in o.items()}


def traced(model, x):
    with torch.no_grad(), tokred.trace(model) as t:
        logits = model(x)
    return logits, t


REMOVED = [5, 0, 7, 3]
VARIANTS = [dict(mode=mode, pooling=pooling) for mode in (0, 1, 2) for pooling in (0, 1, 2, 3)] + [
    dict(two_way=False),
    dict(t_sim=0, mode=0),
    dict(t_info=0),
    dict(t_size=0.0),
    dict(t_sim=3, t_info=2, t_size=5),
    dict(prop_attn=False),
]


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, {}) for name in TINY] + [(name, v) for name in ("distilled", "gap-reg4-nocls") for v in VARIANTS],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{n}{x}" for n, x in v.items()) or "default",
)
def test_agrees_with_the_float64_oracle(name, variant):
    model = tiny(name).double()
    with torch.no_grad():
        x, want, source = clear_case(model, **variant)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-5)):
        patched = tokred.apply(copy.deepcopy(model).to(dtype), "mctf", r=REMOVED, **options_of(variant))
        got, t = traced(patched, x.to(dtype))
        assert torch.equal(t.source.long(), source)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from(["deit", "avg-all"]),
    st.sampled_from(VARIANTS),
)
def test_agrees_with_the_float64_oracle_for_any_schedule(wanted, seed, name, variant):
    model, x = tiny(name).double(), images(1, seed=seed).double()
    patched = tokred.apply(copy.deepcopy(model), "mctf", r=wanted, **options_of(variant))
    removed = patched._schedule(patched._embed(x))
    with torch.no_grad():
        want, source, _ = mctf_oracle(model, x, [r or 0 for r in removed], **variant)
    got, t = traced(patched, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(t.source.long(), source)


@pytest.mark.parametrize("name", ["deit", "gap-reg4-nocls", "no-prefix", "distilled"])
@pytest.mark.parametrize("side", [8, 16, 24, 48])
@pytest.mark.parametrize("r", [1000, 0.99])
def test_never_below_ten_tokens_nor_half_of_the_patches(name, side, r):
    model = tokred.apply(tiny(name, img_size=side), "mctf", r=r, stages=(0, 1, 2, 3))
    p, left = model.num_prefix_tokens, (side // 8) ** 2
    want = [p + left]
    for _ in range(4):
        wanted = 1000 if r == 1000 else left * 99 // 100
        left -= max(0, min(wanted, left // 2, p + left - 10))
        want.append(p + left)
    logits, t = traced(model, images(2, side))
    assert t.tokens == want and logits.isfinite().all()


@pytest.mark.parametrize("name", ["deit", "gap", "avg-all"])
@pytest.mark.parametrize("r", [0, [0, 0], (0, -1)], ids=str)
def test_r_0_is_timm_bit_for_bit(name, r):
    model = tiny(name)
    assert_same_forward(tokred.apply(copy.deepcopy(model), "mctf", r=r), model, images())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if len(v) == 2 and "pooling" in v] + [{}], ids=str)
def test_gradients_flow_through_the_fused_map_and_not_through_the_weights(variant):
    model = tiny("qk_norm").double()
    x, logits, _ = clear_case(model, **variant)
    logits.square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    tokred.apply(model, "mctf", r=REMOVED, **options_of(variant))
    model.train()(x.double()).square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[n], rtol=1e-8, atol=1e-9 * want[n].abs().max().item() + 1e-15, msg=n)


def test_prefix_is_kept_and_sizes_count_every_token():
    for name in ("no-prefix", "deit", "distilled", "dinov2-reg4", "cls-reg9"):
        model = tokred.apply(tiny(name), "mctf", r=6, stages=range(4))
        p, x, size = model.num_prefix_tokens, model._embed(images()), None
        for block, r in zip(model.blocks, model._schedule(x), strict=True):
            x, size, assign = block(x, size, r, True)
            assert torch.equal(assign[:, :p], torch.arange(p, dtype=torch.int32).expand(2, p))
            assert torch.equal(size[:, :p], torch.ones(2, p))
            assert torch.equal(size.sum(1), torch.full((2,), p + 36.0))


def test_one_image_alone_fuses_as_in_its_batch():
    model = tokred.apply(tiny("distilled"), "mctf", r=5)
    vits.assert_one_image_alone(lambda x: traced(model, x)[1].source.numpy(), images(3))


def test_constant_tokens_stay_constant():
    model = tokred.apply(tiny("gap"), "mctf", r=6)
    for parameter in (model.pos_embed, model.patch_embed.proj.weight):
        parameter.data.zero_()
    with torch.no_grad():
        x = model.forward_features(images())
    assert x.shape[1] == 18
    torch.testing.assert_close(x, x[:, :1].expand_as(x), rtol=0, atol=1e-6)


def test_a_token_that_nobody_looks_at_attracts_most_but_not_infinitely():
    method = create("mctf", dict(r=3))
    weight = method.weight(torch.tensor([[0.5, 0.5, 0.0, 1e-30]]), torch.tensor([[1.0, 500, 1, 70000]]))
    assert weight.isfinite().all() and (weight > 0).all() and weight[0, 2] == 1


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_and_autocast_are_finite(mode, dtype):
    model = tokred.apply(tiny("gap-reg4-nocls"), "mctf", r=6, one_step_ahead=mode)
    want, _ = traced(model, images())
    got, _ = traced(copy.deepcopy(model).to(dtype), images().to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        mixed, _ = traced(model, images())
    for other in (got.float(), mixed.float()):  # half precision may fuse other patches
        assert (other - want).abs().max() < 0.5 * want.abs().max()


def test_dropout_of_the_attention_trains_where_scores_are_apart():
    model = tiny("deit", attn_drop_rate=0.2).train()
    for mode in (1, 2):
        tokred.apply(model, "mctf", r=5, one_step_ahead=mode)(images()).sum().backward()
        tokred.remove(model)
    with pytest.raises(ValueError, match="no dropout: train with attn_drop = 0"):
        tokred.apply(model, "mctf", r=5, one_step_ahead=0)(images())


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_compile_and_export(mode):
    model = tokred.apply(tiny("distilled", depth=3), "mctf", r=6, one_step_ahead=mode)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(images(3))
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images(3)), want)
        if mode == 1:
            program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            buffer.seek(0)
            torch.testing.assert_close(torch.export.load(buffer).module()(images(3)), want)


def test_mode_1_holds_no_matrix():
    """No tensor has two dimensions of tokens but inside the ops."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                assert not isinstance(t, torch.Tensor) or sum(n in (37, 31) for n in t.shape) < 2, func
            return out

    block = tokred.apply(tiny("deit"), "mctf", r=6).blocks[1]
    with torch.no_grad(), Shapes():
        block(torch.randn(2, 37, 32), None, 6)


BAD = {
    "negative": (dict(r=-1), "mctf: r must be ints of at least 0 or fractions in (0, 1), got -1"),
    "fraction": (dict(r=1.5), "mctf: r must be ints of at least 0 or fractions in (0, 1), got 1.5"),
    "entry": (dict(r=[3, "x"]), "mctf: r must be ints of at least 0 or fractions in (0, 1), got [3, 'x']"),
    "bool": (dict(r=True), "mctf: r must be ints of at least 0 or fractions in (0, 1), got True"),
    "inflection": (dict(r=(8, 2)), "r: the inflection must be in [-1, 1], got 2"),
    "stages beside a list": (
        dict(r=[3, 3], stages=(1,)),
        "mctf: stages must be ascending, and left out where r is a list of all blocks, got (1,)",
    ),
    "stages too deep": (dict(r=0.35), "mctf: stages must be below 4, the number of blocks, got (3, 6, 9)"),
    "stages": (
        dict(r=3, stages=(2, 2)),
        "mctf: stages must be ascending, and left out where r is a list of all blocks, got (2, 2)",
    ),
    "mode": (dict(r=3, one_step_ahead=3), "mctf: one_step_ahead must be 0, 1 or 2, got 3"),
    "pooling": (dict(r=3, pooling="max"), "mctf: pooling must be 0, 1, 2 or 3, got 'max'"),
    "t": (dict(r=3, t_info=-1), "mctf: t_info must be a number of at least 0, got -1"),
    "t nan": (dict(r=3, t_sim=float("nan")), "mctf: t_sim must be a number of at least 0, got nan"),
    "bidirectional": (dict(r=3, bidirectional=1), "mctf: bidirectional must be True or False, got 1"),
    "no r": ({}, "apply: mctf needs the option r="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    options, message = BAD[name]
    model = tiny("deit")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokred.apply(model, "mctf", **options)
    assert not hasattr(model, "tokred_method")


def test_a_projection_that_is_not_linear_is_refused_where_it_is_taken_apart():
    model = tiny("deit")
    model.blocks[1].attn.qkv = torch.nn.Sequential(model.blocks[1].attn.qkv)
    with pytest.raises(ValueError, match=r"^mctf: one_step_ahead=1 projects values apart .* needs nn\.Linear$"):
        tokred.apply(model, "mctf", r=3)
    assert traced(tokred.apply(model, "mctf", r=3, one_step_ahead=2), images())[0].isfinite().all()
