"""Learned parts: names and shapes as published, where they start, and that all of them learn."""

import io

import pytest
import torch
from test_models_lifecycle import gradients
from vits import images, randomised, tiny

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


def patched(method):
    model = tokred.apply(tiny("deit"), method, **OPTIONS)
    for index, block in enumerate(model.blocks):
        if block.tokred_part is not None:
            randomised(block.tokred_part, seed=index)
    return model


def run(model):
    with torch.no_grad():
        return model(images())


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
def test_gradients_reach_every_parameter(method):
    model = patched(method).double().train()
    found = gradients(model, images().double())
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, g in found.items():
        if method == "dpcknn" and name.endswith("score.bias"):
            assert g.abs().max() < 1e-12, name  # the weights of a cluster are shares: what all have in common cancels
        else:
            assert g.isfinite().all() and g.abs().max() > 0, name
