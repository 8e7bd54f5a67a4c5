"""METR checkpoints in timm models, and the logits of their exits, on synthetic weights with the published names."""

import copy
import re
import threading

import pytest
import torch
import torch.nn.functional as F
import vits
from vits import images, tiny

import tokred_kernels as tokred

C, CLASSES = 32, 7


def checkpoint(blocks=(1, 2, 3), seed=5):
    """A state dict as METR saves it."""
    weights = dict(tiny("deit", seed).state_dict())
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        shapes = {"0.weight": (C,), "0.bias": (C,), "1.weight": (C, C), "1.bias": (C,)}
        shapes |= {"3.weight": (CLASSES, C), "3.bias": (CLASSES,)}
        for name, shape in shapes.items():
            weights[f"mid_heads.{block}.{name}"] = torch.randn(shape, generator=generator)
    return weights


def exit_of(weights, block, cls):
    """The exit as published: LayerNorm, Linear, Tanh, Linear."""
    at = {name: weights[f"mid_heads.{block}.{name}"] for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    hidden = F.layer_norm(cls, (C,), at["0.weight"], at["0.bias"], eps=1e-6)
    hidden = torch.tanh(F.linear(hidden, at["1.weight"], at["1.bias"]))
    return F.linear(hidden, weights[f"mid_heads.{block}.3.weight"], weights[f"mid_heads.{block}.3.bias"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_load_into_a_plain_model_and_the_exits_stay_out(wrapped):
    weights = checkpoint()
    model = tiny("deit")
    names = list(model.state_dict())
    assert tokred.load_metr(model, {"model": weights, "epoch": 29} if wrapped else weights) is model
    assert list(model.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(model(images()), tiny("deit", 5)(images()))


def test_loading_takes_no_random_numbers():
    model, weights = tiny("deit"), checkpoint()
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    tokred.load_metr(model, weights, exits=True)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("method", [None, *vits.METHODS])
def test_exits_read_the_class_token_behind_their_blocks(method):
    weights = checkpoint()
    model = tokred.load_metr(tiny("deit"), weights, exits=True)
    if method:
        vits.reduced(model, method)
    with torch.no_grad():
        logits, exits = tokred.exit_logits(model, images())
        assert torch.equal(logits, model(images()))
        grids = model.forward_intermediates(images(), return_prefix_tokens=True, intermediates_only=True)
    assert list(exits) == [1, 2, 3]
    for block, got in exits.items():
        torch.testing.assert_close(got, exit_of(weights, block, grids[block][1][:, 0]))


@pytest.mark.parametrize("method", [None, "metr"])
def test_exits_may_read_between_attention_and_mlp(method):
    weights = checkpoint(blocks=(0, 2))
    model = tokred.load_metr(tiny("deit"), weights, exits=True)
    dense = copy.deepcopy(model)
    if method:
        tokred.apply(model, method, keep_rate=0.5, stages=(0, 2))
    with torch.no_grad():
        _, exits = tokred.exit_logits(model, images(), exit_at="post_attn")
        block = dense.blocks[0]
        x = dense._pos_embed(dense.patch_embed(images()))
        x = x + block.attn(block.norm1(x))
    assert list(exits) == [0, 2]
    torch.testing.assert_close(exits[0], exit_of(weights, 0, x[:, 0]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.equal(exits[0], tokred.exit_logits(model, images())[1][0])


def test_inference_that_does_not_ask_runs_no_exit_and_hooks_leave():
    model = tokred.apply(tokred.load_metr(tiny("deit"), checkpoint(), exits=True), "metr", keep_rate=0.7, stages=(1, 2))
    ran = []
    model.tokred_exits["1"].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        model(images())
        assert ran == []
        tokred.exit_logits(model, images())
        model(images())
    assert ran == [1]
    with pytest.raises(AssertionError, match="Input height"):
        tokred.exit_logits(model, images(2, 40))
    for block in model.blocks:
        assert not block._forward_hooks and not block.norm2._forward_pre_hooks


def test_exits_train():
    model = tokred.apply(tokred.load_metr(tiny("deit"), checkpoint(), exits=True), "metr", keep_rate=0.7, stages=(1, 2))
    _, exits = tokred.exit_logits(model.train(), images())
    sum(logits.square().sum() for logits in exits.values()).backward()
    assert model.training and model.tokred_exits.training
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.tokred_exits.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_threads_read_their_own_exits():
    model = tokred.load_metr(tiny("deit"), checkpoint(), exits=True)
    inputs = [images(2, seed=1), images(3, seed=2)]
    with torch.no_grad():
        want = [tokred.exit_logits(model, x)[1] for x in inputs]
    results: list[list] = [[], []]

    def work(n):
        with torch.no_grad():
            results[n] = [tokred.exit_logits(model, inputs[n])[1] for _ in range(10)]

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (0, 1):
        assert len(results[n]) == 10
        assert all(torch.equal(got[block], want[n][block]) for got in results[n] for block in (1, 2, 3))


@pytest.mark.parametrize("patched", [False, True])
def test_remove_takes_the_exits_away(patched):
    model = tokred.load_metr(tiny("deit"), checkpoint(), exits=True)
    if patched:
        tokred.apply(model, "metr", keep_rate=0.5, stages=(1,))
    other = copy.deepcopy(model)
    assert any(name.startswith("tokred_exits.") for name in model.state_dict())
    tokred.remove(model)
    assert list(model.state_dict()) == list(tiny("deit").state_dict()) and type(model) is type(tiny("deit"))
    assert tokred.exit_logits(other, images())[1].keys() == {1, 2, 3}


def test_weights_load_again_with_and_without_exits():
    model = tokred.load_metr(tiny("deit"), checkpoint(), exits=True)
    other = checkpoint(seed=6)
    tokred.load_metr(model, other, exits=True)
    assert torch.equal(model.tokred_exits["3"][3].weight, other["mid_heads.3.3.weight"])
    tokred.load_metr(model, other)
    assert not hasattr(model, "tokred_exits")


def test_exits_follow_the_dtype_of_the_model():
    model = tokred.load_metr(tiny("deit").double(), checkpoint(), exits=True)
    assert tokred.exit_logits(model, images().double())[1][1].dtype == torch.float64


def bad(change):
    weights = checkpoint()
    change(weights)
    return weights


WRONG = {
    "missing": (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
    "missing part of an exit": (lambda w: w.pop("mid_heads.2.1.bias"), "mid_heads.2.1.bias is missing"),
    "unknown": (lambda w: w.update(extra=torch.zeros(1)), "extra is unknown"),
    "unknown part of an exit": (
        lambda w: w.update({"mid_heads.2.2.bias": torch.zeros(1)}),
        "mid_heads.2.2.bias is unknown",
    ),
    "shape": (lambda w: w.update({"head.bias": torch.zeros(9)}), "head.bias is [9], the model's [7]"),
    "shape of an exit": (
        lambda w: w.update({"mid_heads.1.3.weight": torch.zeros(9, C)}),
        "mid_heads.1.3.weight is [9, 32], the model's [7, 32]",
    ),
    "behind no block": (lambda w: w.update(checkpoint((11,))), "mid_heads.11 is behind no block"),
    "no exits": (lambda w: [w.pop(n) for n in list(w) if n.startswith("mid_heads")], "there are no exits"),
    "everything": (lambda w: w.clear(), "and 53 more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_refused_in_one_line_and_the_model_left_alone(name):
    change, said = WRONG[name]
    model = tiny("deit")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^load_metr: the weights do not fit the model: .*{re.escape(said)}") as error:
        tokred.load_metr(model, bad(change), exits=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert list(model.state_dict()) == list(before)


def test_what_exit_logits_cannot_do_is_refused():
    model = tiny("deit")
    with pytest.raises(ValueError, match=r"exit_logits: the model has no exits: add_exits\(model\), load_metr"):
        tokred.exit_logits(model, images())
    tokred.load_metr(model, checkpoint(), exits=True)
    with pytest.raises(ValueError, match="exit_at must be one of post_block, post_attn, got 'input'"):
        tokred.exit_logits(model, images(), exit_at="input")
    model.blocks[1].compile()
    with pytest.raises(ValueError, match="exit_logits: the model is compiled"):
        tokred.exit_logits(model, images())


def test_a_model_without_a_class_token_has_no_exits():
    model = tiny("gap")
    weights = {**model.state_dict(), **{n: t for n, t in checkpoint().items() if n.startswith("mid_heads.")}}
    tokred.load_metr(model, weights)
    with pytest.raises(ValueError, match="no class token for exits to read"):
        tokred.load_metr(model, weights, exits=True)
