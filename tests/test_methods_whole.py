"""What holds for every method that reduces whole tokens between blocks: lifecycle, gradients, compilation."""

import copy
import io

import pytest
import torch
from test_models_lifecycle import gradients
from timm.layers import set_reentrant_ckpt
from vits import assert_one_image_alone, assert_same_forward, images, randomised, tiny

import tokred_kernels as tokred

METHODS = {  # options, the names of the part's parameters
    "sit": (
        dict(tokens=[25, 9], stages=(1, 3)),
        ["scale", *(f"weight.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias"))],
    ),
    "patchmerger": (dict(tokens=[25, 9], stages=(1, 3)), ["queries", "norm.weight", "norm.bias"]),
    "sinkhorn": (dict(tokens=[25, 9], stages=(1, 3)), ["v"]),
    "dpcknn": (dict(tokens=[25, 9], stages=(1, 3)), ["score.weight", "score.bias"]),
    "dynamicvit": (
        dict(tokens=[25, 9], stages=(1, 3)),
        [
            f"{layer}.{kind}"
            for layer in ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")
            for kind in ("weight", "bias")
        ],
    ),
    "kmedoids": (dict(tokens=[25, 9], stages=(1, 3)), []),
}
every_method = pytest.mark.parametrize("method", METHODS)


def patched(method, name="deit", dtype=torch.float32, **options):
    model = tokred.apply(tiny(name, **options), method, **METHODS[method][0])
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
    dense = tiny("deit")
    model = patched(method)
    names = METHODS[method][1]
    assert set(model.state_dict()) == {
        *dense.state_dict(),
        *(f"blocks.{b}.tokred_part.{n}" for b in (1, 3) for n in names),
    }
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = tokred.apply(tiny("deit", seed=7), method, **METHODS[method][0])
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(run(other), run(model))


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
    tokred.apply(other, method, **METHODS[method][0]).load_state_dict(model.state_dict())
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
