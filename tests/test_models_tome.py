"""What a patched timm model computes: against timm with r = 0, against a float64 oracle with r > 0."""

import contextlib
import copy

import pytest
import timm
import torch
import vits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from vits import TINY, assert_same_forward, images, tiny

import tokred_kernels as tokred

REAL = [  # real widths and image sizes, two blocks
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_gap_240",
    "vit_little_patch16_reg4_gap_256",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_small_r26_s32_224",
]


@pytest.mark.parametrize("name", REAL)
def test_r_0_is_timm_bit_for_bit_on_real_models(name):
    model = vits.randomised(timm.create_model(name, depth=2)).eval()
    x = images(1, model.patch_embed.img_size[0])
    reference = copy.deepcopy(model)
    assert_same_forward(tokred.apply(model, "tome", r=0), reference, x)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("r", [0, (0, -1), [0, 0], []], ids=str)
def test_r_0_is_timm_bit_for_bit(name, r):
    model = tiny(name)
    assert_same_forward(tokred.apply(copy.deepcopy(model), "tome", r=r), model, images())


@pytest.mark.parametrize("name", ["deit", "gap-reg4-nocls", "distilled"])
def test_r_0_trains_as_timm_bit_for_bit(name):
    options = dict(drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1, patch_drop_rate=0.25)
    model = tiny(name, drop_rate=0.1, **options).train()
    patched = tokred.apply(copy.deepcopy(model), "tome", r=0)
    for m in (model, patched):
        torch.manual_seed(3)
        m(images()).square().sum().backward()
    for a, b in zip(model.parameters(), patched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_agrees_with_the_float64_oracle(name, prop_attn):
    model = tiny(name)
    removed = [5, 0, 7, 3]
    want, source, clear = vits.tome_oracle(model, images(), removed, prop_attn)
    assert clear, "the seed leaves a choice to rounding"
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        patched = tokred.apply(copy.deepcopy(model).to(dtype), "tome", r=removed, prop_attn=prop_attn)
        with torch.no_grad(), tokred.trace(patched) as t:
            got = patched(images().to(dtype))
        assert torch.equal(t.source.long(), source)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("name", ["deit", "distilled", "gap", "cls-reg9", "qk_norm", "no-prefix", "siglip-map"])
@pytest.mark.parametrize("tokens", [[20, 9], [9, 2], [3, 1], [36, 1]], ids=str)
def test_stages_merge_in_rounds_until_their_count_is_reached(name, tokens):
    model = tiny(name)
    p = model.num_prefix_tokens
    removed = [0, 36 - tokens[0], 0, tokens[0] - tokens[1]]
    want, source, clear = vits.tome_oracle(model, images(), removed, rounds=6)
    assert clear, "the seed leaves a choice to rounding"
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-5)):
        patched = tokred.apply(copy.deepcopy(model).to(dtype), "tome", tokens=tokens, stages=(1, 3))
        with torch.no_grad(), tokred.trace(patched) as t:
            got = patched(images().to(dtype))
        assert torch.equal(t.source.long(), source)
        assert t.tokens == [p + 36] * 2 + [p + tokens[0]] * 2 + [p + tokens[1]]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_stages_where_half_is_enough_merge_as_the_same_r_does():
    x = images()
    for options in (dict(keep_rate=[0.7, 0.5], stages=(0, 2)), dict(tokens=[25, 18], stages=(0, 2))):
        staged = tokred.apply(tiny("gap"), "tome", **options)
        with torch.no_grad():
            assert torch.equal(staged(x), tokred.apply(tiny("gap"), "tome", r=[11, 0, 7, 0])(x))


@pytest.mark.parametrize("name", ["deit", "gap"])
def test_a_keep_rate_of_1_is_timm_bit_for_bit(name):
    model = tiny(name)
    assert_same_forward(tokred.apply(copy.deepcopy(model), "tome", keep_rate=1, stages=(1, 3)), model, images())


@pytest.mark.parametrize(
    ("keep_rate", "kept", "macs"),
    [(0.9, [176, 158, 142], 3.96), (0.7, [137, 96, 67], 2.98), (0.5, [98, 49, 24], 2.28), (0.25, [49, 12, 3], 1.70)],
)
def test_stages_of_deit_reach_every_published_count(keep_rate, kept, macs):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    counts = tokred.schedule.tokens(model, method="tome", keep_rate=keep_rate)
    assert [after for _, after in counts] == [197] * 3 + [n + 1 for n in kept for _ in range(3)]
    assert round(tokred.schedule.macs(model, method="tome", keep_rate=keep_rate) / 1e9, 2) == macs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_of_half_models_compare_merged_keys_in_float32(dtype, monkeypatch):
    model, seen = tokred.apply(tiny("deit"), "tome", tokens=[4], stages=(1,)).to(dtype), []
    match = torch.ops.tokred.match
    monkeypatch.setattr(torch.ops.tokred, "match", lambda k, *a: (seen.append(k.dtype), match(k, *a))[1])
    with torch.no_grad():
        assert model(images().to(dtype)).isfinite().all()
    assert seen == [dtype] + [torch.float32] * 3  # 36, 18, 9, 5, 4


def test_rounds_compile_and_train():
    model = tokred.apply(tiny("gap", depth=2), "tome", tokens=[5], stages=(1,))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images()), model(images()))
    model.train()(images()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["gap", "gap-reg4-nocls", "deit"])
def test_average_pooling_divides_by_the_patches_there_were(name):
    """As in MAE: the sum of size x over the patches, by their number in the image, then fc_norm."""
    model = tiny(name, global_pool="avg", fc_norm=True)
    tokred.apply(model, "tome", r=6)
    p = model.num_prefix_tokens
    with torch.no_grad():
        x, size = model._reduce(images(), None, False)
        want = model.head(model.fc_norm((x * size[..., None])[:, p:].sum(1) / 36))
        torch.testing.assert_close(model(images()), want)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from(["deit", "gap-reg4-nocls"]),
)
def test_agrees_with_the_float64_oracle_for_any_schedule(removed, seed, name):
    model = tiny(name)
    x = images(1, seed=seed)
    want, source, _ = vits.tome_oracle(model, x, removed)
    patched = tokred.apply(model.double(), "tome", r=removed)
    with torch.no_grad(), tokred.trace(patched) as t:
        torch.testing.assert_close(patched(x.double()), want, rtol=1e-9, atol=1e-9)
    assert torch.equal(t.source.long(), source)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("r", [1, 1000, (8, -1), (8, 1)], ids=str)
def test_prefix_is_kept_and_sizes_count_every_token(name, r):
    model = tokred.apply(tiny(name), "tome", r=r)
    p = model.num_prefix_tokens
    x = model._embed(images())
    N0, size = x.shape[1], None
    for block, removed in zip(model.blocks, model._schedule(x), strict=True):
        before = x.shape[1]
        x, size, assign = block(x, size, removed, True)
        assert x.shape[1] == before - min(removed, (before - p) // 2)
        if assign is None:
            assert removed == 0
            continue
        assert torch.equal(assign[:, :p], torch.arange(p, dtype=torch.int32).expand(2, p))
        for row in assign:
            assert torch.equal(row.unique(), torch.arange(x.shape[1], dtype=torch.int32))
        assert size.dtype == torch.float32
        assert torch.equal(size[:, :p], torch.ones(2, p))
        assert torch.equal(size.sum(1), torch.full((2,), float(N0)))
    if r == 1000:
        assert x.shape[1] == p + 3  # 36, 18, 9, 5, 3 patches


def test_a_token_of_size_2_counts_as_two_in_proportional_attention():
    block = tokred.apply(tiny("deit"), "tome", r=1).blocks[0]
    x = torch.randn(2, 10, 32)
    doubled = torch.cat([x, x[:, 4:5]], 1)
    size = torch.ones(2, 10)
    size[:, 4] = 2
    sized, twice = block.attend(*block.project(x), size)[0], block.attend(*block.project(doubled))[0]
    torch.testing.assert_close(sized, twice[:, :10], rtol=1e-5, atol=1e-5)


def test_constant_tokens_stay_constant():
    model = tokred.apply(tiny("gap"), "tome", r=6)
    for p in (model.pos_embed, model.patch_embed.proj.weight):
        p.data.zero_()
    with torch.no_grad():
        x = model.forward_features(images())
    assert x.shape[1] == 12
    torch.testing.assert_close(x, x[:, :1].expand_as(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["deit", "siglip-map", "cls-reg9"])
def test_an_image_alone_merges_as_in_its_batch(name):
    model = tokred.apply(tiny(name), "tome", r=5)

    def source(x):
        with torch.no_grad(), tokred.trace(model) as t:
            model(x)
        return t.source.numpy()

    vits.assert_one_image_alone(source, images(3))


@pytest.mark.parametrize("keys", ["equal", "zero"])
def test_tied_keys_merge_the_lowest_indices(keys):
    """All keys equal or zero: the first r patches of a go into the first patch of b."""
    model = tokred.apply(tiny("deit", qkv_bias=True), "tome", r=4)
    for block in model.blocks:
        block.attn.qkv.weight.data[32:64] = 0
        block.attn.qkv.bias.data[32:64] = 0 if keys == "zero" else 0.5
    with torch.no_grad(), tokred.trace(model) as t:
        model(images())
    for assign, N in zip(t.assign, t.tokens[:-1], strict=True):
        first_b = 1 + (N - 1) // 2 - 4  # after the class token and the kept of a, which sits at 2, 4, ...
        assert assign[0, 2::2].tolist() == [first_b] * 4 + list(range(1, first_b))
        assert assign[0, 1::2].tolist() == list(range(first_b, N - 4))


@pytest.mark.parametrize("name", ["deit", "gap-reg4-nocls", "siglip-map", "prr-avg"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_and_autocast_keep_sizes_in_float32(name, dtype):
    model = tokred.apply(tiny(name), "tome", r=5)
    with torch.no_grad():
        want = model(images())
        half = copy.deepcopy(model).to(dtype)
        got = half(images().to(dtype))
        assert got.dtype == dtype
        assert half._reduce(images().to(dtype), None, False)[1].dtype == torch.float32
        with torch.autocast("cpu", dtype=dtype):
            mixed = model(images())
            assert model._reduce(images(), None, False)[1].dtype == torch.float32
    assert mixed.isfinite().all() and got.isfinite().all()
    # Half precision may merge other pairs: only the size of the logits is comparable.
    for other in (got.float(), mixed.float()):
        assert (other - want).abs().max() < 0.5 * want.abs().max()


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() != "aten::_unsafe_view":  # a view that declares no alias
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_reducing_step_dispatches_no_op_more_than_the_dense_block():
    """C10: match and the fused tail, which is also an addition and the norm; our attention stands for torch's, and
    views touch no memory. In training, match and merge come on top."""
    dense = tiny("deit").blocks[0]
    block = tokred.apply(tiny("deit"), "tome", r=5).blocks[0]
    x, size = torch.randn(2, 37, 32), torch.ones(2, 37)
    with torch.no_grad(), CountOps() as plain:
        dense(x)
    names = ["tokred::attention" if "attention" in name else name for name in plain.names]
    fused = [*names, "tokred::match", "tokred::add_merge_norm"]
    for absorbed in ("aten::add.Tensor", "aten::native_layer_norm", "aten::addmm"):
        fused.remove(absorbed)
    fused.append("aten::mm")  # the bias of the projection too is added by the tail
    for sizes, r, want in ((None, 5, fused), (size, 5, fused), (size, 0, names)):
        with torch.no_grad(), CountOps() as counted:
            block(x, sizes, r)
        assert sorted(counted.names) == sorted(want)
    with torch.no_grad(), unfused(block), CountOps() as counted:
        block(x, size, 5)
    assert sorted(counted.names) == sorted([*names, "tokred::match", "tokred::merge"])


@contextlib.contextmanager
def unfused(block):
    """Whoever watches the norm makes it run on its own."""
    handle = block.norm2.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.parametrize("name", ["deit", "deit3"])
@pytest.mark.parametrize("watched", ["attn.q_norm", "attn.proj", "attn.proj_drop", "ls1", "drop_path1", "ls2"])
def test_who_watches_a_module_sees_it_run_in_every_block(name, watched):
    """Modules that do nothing are not called, and the tail scales and adds the bias: not where somebody looks on."""
    model = tokred.apply(tiny(name), "tome", r=5)
    with torch.no_grad():
        want = model(images())
        seen = []
        for block in model.blocks:
            block.get_submodule(watched).register_forward_hook(lambda module, given, out: seen.append(out))
        got = model(images())
    assert len(seen) == len(model.blocks) and all(out.isfinite().all() for out in seen)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_unfused_attention_setting_of_timm_does_not_bring_back_the_matrix():
    model = tiny("deit")
    patched = tokred.apply(copy.deepcopy(model), "tome", r=5)
    for block in patched.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), CountOps() as counted:
        patched(images())
    assert not any("softmax" in name for name in counted.names)
