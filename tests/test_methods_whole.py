"""What holds for every method that reduces whole tokens between blocks: lifecycle, gradients, compilation."""

import copy
import io

import pytest
import torch
from test_models_lifecycle import gradients
from timm.layers import set_reentrant_ckpt
from vits import assert_one_image_alone, assert_same_forward, images, randomised, tiny

import tokred_kernels as tokred

D = 32
METHODS = {  # the parameters of a part that leaves M patches: names and shapes of published checkpoints
    "sit": lambda M: {
        "scale": (1, 1, 1),
        **_layer("weight.0", D),
        **_layer("weight.1", D // 2, D),
        **_layer("weight.3", M, D // 2),
    },
    "patchmerger": lambda M: {"queries": (M, D), **_layer("norm", D)},
    "sinkhorn": lambda M: {"v": (M, D)},
    "dpcknn": lambda M: _layer("score", 1, D),
    "dynamicvit": lambda M: {
        **_layer("in_conv.0", D),
        **_layer("in_conv.1", D, D),
        **_layer("out_conv.0", D // 2, D),
        **_layer("out_conv.2", D // 4, D // 2),
        **_layer("out_conv.4", 2, D // 4),
    },
    "kmedoids": lambda M: {},
}
OPTIONS = dict(tokens=[25, 9], stages=(1, 3))


def _layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


every_method = pytest.mark.parametrize("method", METHODS)


def patched(method, name="deit", dtype=torch.float32, **options):
    model = tokred.apply(tiny(name, **options), method, **OPTIONS)
    for index, block in enumerate(model.blocks):
        if block.tokred_part is not None:
            randomised(block.tokred_part, seed=index)
    return model.to(dtype)


def run(model, x=None):
    with torch.no_grad():
        return model(images() if x is None else x)


@every_method
@pytest.mark.parametrize("name", ["deit", "gap-reg4-nocls"])
def test_keeping_everything_is_timm_bit_for_bit(method, name):
    model = tiny(name)
    same = tokred.apply(copy.deepcopy(model), method, keep_rate=1, stages=(1, 3))
    assert list(same.state_dict()) == list(model.state_dict())
    assert_same_forward(same, model, images())


@every_method
def test_state_dict_names_and_round_trip(method):
    model = patched(method)
    want = {name: tuple(t.shape) for name, t in tiny("deit").state_dict().items()}
    for block, M in ((1, 25), (3, 9)):
        want |= {f"blocks.{block}.tokred_part.{name}": shape for name, shape in METHODS[method](M).items()}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == want
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = tokred.apply(tiny("deit", seed=7), method, **OPTIONS)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(run(other), run(model))


@every_method
def test_parts_start_as_published_and_follow_the_model(method):
    """Linear layers N(0, 0.02^2), queries and centres N(0, 1), the rest as torch has it."""
    torch.manual_seed(0)
    model = tokred.apply(
        tiny("deit", depth=12, embed_dim=192).half(), method, keep_rate=0.7, stages=range(3, 11)
    ).eval()
    found = {"linear": [], "normal": []}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float16 and parameter.requires_grad
        if "tokred_part" in name and parameter.dim() == 2:
            found["normal" if name.endswith((".queries", ".v")) else "linear"].append(parameter.flatten())
        elif "tokred_part" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert not any(module.training for module in model.modules())
    for kind, std in (("linear", 0.02), ("normal", 1.0)):
        if found[kind]:
            values = torch.cat(found[kind]).float()
            assert abs(values.std() / std - 1) < 0.1 and abs(values.mean() / std) < 0.1


@every_method
def test_remove_takes_the_parts_away_and_copies_live_apart(method):
    model, dense = patched(method), tiny("deit")
    want = run(model)
    other = copy.deepcopy(model)
    assert torch.equal(run(other), want)
    assert tokred.remove(other) is other
    assert list(other.state_dict()) == list(dense.state_dict())
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(other.modules(), dense.modules(), strict=True))
    assert torch.equal(run(other), run(dense)) and torch.equal(run(model), want)
    tokred.apply(other, method, **OPTIONS).load_state_dict(model.state_dict())
    assert torch.equal(run(other), want)


@every_method
def test_gradients_reach_every_parameter(method):
    model = patched(method).double().train()
    found = gradients(model, images().double())
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, g in found.items():
        assert g.isfinite().all() and g.abs().max() > 0, name


@every_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(method, reentrant):
    model = patched(method, drop_path_rate=0.2, proj_drop_rate=0.1).train()
    want = gradients(model, images())
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        got = gradients(model, images())
    finally:
        set_reentrant_ckpt(False)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@every_method
def test_the_model_is_one_graph_and_exports(method):
    model = patched(method)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images()), model(images()))
        exported = torch.export.export(model, (images(),)).module()
        torch.testing.assert_close(exported(images()), model(images()))


@every_method
def test_an_image_alone_is_reduced_as_in_its_batch(method):
    model = patched(method, dtype=torch.float64)

    def source(x):
        with torch.no_grad(), tokred.trace(model) as t:
            logits = model(x)
        torch.testing.assert_close(logits, torch.cat([run(model, one[None]) for one in x]), rtol=1e-10, atol=1e-10)
        return t.source.numpy()

    assert_one_image_alone(source, images(3).double())


@every_method
@pytest.mark.parametrize("name", ["deit", "gap-reg4-nocls"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_and_autocast_are_close(method, name, dtype):
    model = patched(method, name)
    want = run(model)
    half = copy.deepcopy(model).to(dtype)
    got = run(half, images().to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        mixed = run(model)
    assert got.dtype == dtype
    for other in (got.float(), mixed.float()):  # half precision may choose other patches
        assert (other - want).abs().max() < 0.5 * want.abs().max()


@every_method
def test_prefix_tokens_stay_as_they_are(method):
    """Of registers, class and distillation tokens; and patches get rows behind them."""
    for name in ("no-prefix", "deit", "distilled", "dinov2-reg4", "cls-reg9"):
        model = patched(method, name)
        p = model.num_prefix_tokens
        with torch.no_grad(), tokred.trace(model) as t:
            model.forward_features(images())
        for assign in t.assign:
            if assign is not None:
                assert assign.dtype == torch.int32
                assert torch.equal(assign[:, :p], torch.arange(p, dtype=torch.int32).expand(2, p))
                assert not ((assign[:, p:] >= 0) & (assign[:, p:] < p)).any()
        assert t.tokens[-1] == p + 9


@every_method
def test_an_empty_batch_and_dense_outputs(method):
    model = patched(method)
    assert run(model, images(0)).shape == (0, 7)
    final, grids = model.forward_intermediates(images())
    assert final.shape == (2, 37, 32) and all(g.shape == (2, 32, 6, 6) for g in grids)
