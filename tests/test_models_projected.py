"""ToMe with metric="projected": the head mean of the keys as more columns of the qkv projection."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vits import images, randomised, tiny

import tokred_kernels as tokred
from tokred_kernels import schedule


def projected(name: str = "deit", seed: int = 0, **options):
    return tokred.apply(tiny(name, seed), "tome", metric="projected", **(options or {"r": 5}))


def fresh(model):
    """The logits of a copy, which keeps nothing."""
    return copy.deepcopy(model)(images().to(model.pos_embed.dtype))


def other_weights(seed: int = 9) -> dict:
    return tiny("deit", seed).state_dict()


@pytest.mark.parametrize("name", ["deit", "no-head", "dinov2-swiglu"])  # "no-head": no bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_columns_are_the_formula(name, dtype):
    block = projected(name).to(dtype).blocks[1]
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = block.norm1(x)
    got = block.tokred_part(y, block.attn.qkv, block.attn.num_heads)
    D, qkv = block.attn.head_dim, block.attn.qkv
    rounded = qkv.weight.double().chunk(3)[1].unflatten(0, (-1, D)).mean(0).to(dtype).double()
    want = y.double() @ rounded.mT
    if qkv.bias is not None:
        want += qkv.bias.double().chunk(3)[1].unflatten(0, (-1, D)).mean(0).to(dtype).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[..., -D:].double(), want, rtol=eps, atol=4 * eps * float(want.abs().max()))
    torch.testing.assert_close(got[..., :-D], qkv(y))


@pytest.mark.parametrize("options", [{"r": 5}, {"r": [0, 3, 0, 9]}, {"keep_rate": 0.3, "stages": (1, 2)}], ids=str)
@torch.no_grad()
def test_in_float64_it_chooses_as_keys_do(options):
    model = projected(**options).double()
    keys = tokred.apply(tiny("deit"), "tome", **options).double()
    with tokred.trace(model) as t:
        got = model(images().double())
    with tokred.trace(keys) as of_keys:
        torch.testing.assert_close(got, keys(images().double()), rtol=1e-9, atol=1e-9)
    assert torch.equal(t.source, of_keys.source)


@torch.no_grad()
def test_one_product_and_one_matching_a_block():
    """As many products as timm's block has, and no more than one op more than with keys."""

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    counts = []
    for model in (tiny("deit"), tokred.apply(tiny("deit"), "tome", r=5), projected()):
        model(images())
        found = []
        with Counter():
            model(images())
        counts.append((found.count("addmm") + found.count("mm"), found.count("match"), found.count("cat")))
    assert counts[1][0] == counts[2][0] == counts[0][0]
    assert counts[2][1:] == (4, counts[0][2])  # nothing is made anew


WRITES = {
    "load_state_dict": lambda m: m.load_state_dict(other_weights()),
    "load_state_dict assigns": lambda m: m.load_state_dict(other_weights(), assign=True),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "float64": lambda m: m.double(),
    "one layer": lambda m: m.blocks[1].attn.qkv.bfloat16().float(),
    "an optimizer's step": lambda m: m.blocks[0].attn.qkv.weight.add_(0.5),
    "the bias alone": lambda m: m.blocks[0].attn.qkv.bias.mul_(-3),
    "another parameter": lambda m: setattr(
        m.blocks[2].attn.qkv, "weight", torch.nn.Parameter(-m.blocks[2].attn.qkv.weight)
    ),
    "data between train and eval": lambda m: randomised(m.train(), 9).eval(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_new_weights_are_seen(write):
    model = projected()
    before = model(images())
    write(model)
    got = model(images().to(model.pos_embed.dtype))
    assert torch.equal(got, fresh(model))
    assert not torch.equal(got.float(), before)
    assert torch.equal(model(images().to(got.dtype)), got)


@torch.no_grad()
def test_nothing_of_it_is_saved_or_left():
    model, plain = projected(), tiny("deit")
    want = model(images())
    assert model.blocks[0].tokred_part._kept is not None
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict(), strict=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks[0].tokred_part._kept is None
        assert torch.equal(twin(images()), want)
    tokred.remove(model)
    assert torch.equal(model(images()), plain(images()))
    assert not any("tokred" in name for name, _ in model.named_modules())


def test_gradients_in_eval_mode_are_those_with_keys():
    grads = []
    for options in ({}, {"metric": "projected"}):
        model = tokred.apply(tiny("deit"), "tome", r=5, **options).double()
        with torch.no_grad():
            model(images().double())  # what is kept has no gradient
        model(images().double()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_compiled_and_exported():
    torch._dynamo.reset()
    model = projected()
    want = model(images())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), want)
    model.load_state_dict(other_weights())
    torch.testing.assert_close(compiled(images()), model(images()))
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()))


@torch.inference_mode()
def test_weights_made_for_inference_alone():
    model = projected()
    want = model(images())
    model.blocks[0].attn.qkv.weight.add_(0.5)
    assert not torch.equal(model(images()), want) and torch.equal(model(images()), fresh(model))


def test_its_products_are_counted():
    keys, more = (
        schedule.macs(tokred.apply(tiny("deit"), "tome", r=[5, 0, 5, 0], metric=m)) for m in ("keys", "projected")
    )
    assert more - keys == (37 + 32) * 32 * 16  # D = 16 columns for the tokens of the blocks that reduce


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="no norm of queries and keys"):
        projected("qk_norm")
    with pytest.raises(ValueError, match=r"for inference; call model\.eval"):
        projected().train()(images())
