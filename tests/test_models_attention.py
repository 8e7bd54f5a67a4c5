"""Which attention a patched block runs, and that every choice computes the same."""

import itertools
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from vits import images, tiny

import tokred_kernels as tokred
from tokred_kernels import reference
from tokred_kernels._backend import ATTENTION
from tokred_kernels.models._attention import attend


@pytest.fixture
def calls(monkeypatch):
    """The attentions that ran, in order, with their arguments: "sdpa", "tokred" or "scores"."""
    seen = []
    places = [
        ("sdpa", F, "scaled_dot_product_attention"),
        ("tokred", torch.ops.tokred, "attention"),
        ("scores", torch.ops.tokred, "attention_scores"),
    ]

    def spy(name, call, *args, **options):
        seen.append((name, args, options))
        return call(*args, **options)

    for name, owner, attribute in places:
        monkeypatch.setattr(owner, attribute, partial(spy, name, getattr(owner, attribute)))
    return seen


def chosen(monkeypatch, value):
    for kind in ("plain", "sized", "scored"):
        monkeypatch.setitem(ATTENTION["cpu"], kind, value)


def inputs(D=16, N=37, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, N, 3, 2, D, generator=generator, dtype=dtype).requires_grad_(requires_grad)
    size = torch.randint(1, 9, (2, N), generator=generator).float()
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), size


CASES = list(itertools.product(("tokred", "sdpa"), (16, 12, 136), (False, True), ("none", "cls", "mean")))


@pytest.mark.parametrize(("value", "D", "sized", "scores"), [c for c in CASES if c[1] <= 128 or c[3] == "none"])
def test_every_choice_computes_the_same(value, D, sized, scores, monkeypatch):
    chosen(monkeypatch, value)
    q, k, v, size = inputs(D)
    size = size if sized else None
    out, emitted = attend(q, k, v, size, scores=scores)
    p = reference.attention_matrix(q, k, size, D**-0.5)
    tolerance = 1e-6 if sized else 1e-10  # log size is float32
    torch.testing.assert_close(out, p @ v, rtol=tolerance, atol=tolerance)
    if scores == "none":
        assert emitted is None
    else:
        want = p[:, :, 0].mean(1) if scores == "cls" else p.mean((1, 2))
        torch.testing.assert_close(emitted, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "options"), [("plain", {}), ("sized", {"size": True}), ("scored", {"scores": "cls"})], ids=str
)
def test_the_table_decides(kind, options, monkeypatch, calls):
    q, k, v, size = inputs()
    options = {name: size if name == "size" else value for name, value in options.items()}
    for value, expected in (("tokred", ["tokred"]), ("sdpa", ["sdpa"] + ["scores"] * (kind == "scored"))):
        chosen(monkeypatch, "sdpa" if value == "tokred" else "tokred")
        monkeypatch.setitem(ATTENTION["cpu"], kind, value)
        calls.clear()
        attend(q, k, v, **options)
        assert [name for name, *_ in calls] == expected


@pytest.mark.parametrize("D", [12, 136])
def test_widths_that_our_op_does_not_take_go_to_sdpa(D, calls):
    q, k, v, size = inputs(D)
    attend(q, k, v)
    attend(q, k, v, size)
    assert [name for name, *_ in calls] == ["sdpa"] * 2


@pytest.mark.parametrize("D", [16, 12])
def test_scores_have_their_gradient_whatever_the_table_says(D, monkeypatch):
    chosen(monkeypatch, "sdpa")
    q, k, v, _ = inputs(D, requires_grad=True)
    weight = torch.arange(37, dtype=torch.float64)
    _, scores = attend(q, k, v, scores="cls")
    got = torch.autograd.grad((scores * weight).sum(), (q, k))
    want = torch.autograd.grad(((q @ k.mT / D**0.5).softmax(-1)[:, :, 0].mean(1) * weight).sum(), (q, k))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_without_gradients_the_table_decides_in_training_too(monkeypatch, calls):
    chosen(monkeypatch, "sdpa")
    q, k, v, _ = inputs(requires_grad=True)
    with torch.no_grad():
        attend(q, k, v, scores="cls")
    assert [name for name, *_ in calls] == ["sdpa", "scores"]


def test_keys_are_views_of_qkv_and_sizes_reach_the_op_as_they_are(calls):
    block = tokred.apply(tiny("deit"), "tome", r=5).blocks[0]
    size = torch.ones(2, 37)
    with torch.no_grad():
        block.attend(*block.project(torch.randn(2, 37, 32)), size)
    ((_, (q, k, v, given), _),) = calls
    assert q._base is not None and q._base is k._base is v._base and given is size
    assert all(t.stride() == (37 * 96, 16, 96, 1) for t in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_mask_of_sdpa_is_broadcast_and_in_the_dtype_of_the_queries(dtype, monkeypatch, calls):
    """CUDA's kernels want that dtype, the CPU's do not care."""
    chosen(monkeypatch, "sdpa")
    q, k, v, size = inputs(dtype=dtype)
    attend(q, k, v, size)
    mask = calls[0][2]["attn_mask"]
    assert mask.shape == (2, 1, 1, 37) and mask.dtype == dtype


def test_attention_dropout_acts_in_training_only_and_through_sdpa(calls):
    model = tokred.apply(tiny("deit", attn_drop_rate=0.25), "tome", r=5)
    model(images())
    assert [name for name, *_ in calls] == ["tokred"] * 4
    calls.clear()
    model.train()(images())
    assert [(name, options["dropout_p"]) for name, _, options in calls] == [("sdpa", 0.25)] * 4


@pytest.mark.parametrize("method, options", [("tome", {"r": 2}), ("evit", {"keep_rate": 0.7, "stages": (1,)})])
def test_inference_does_not_run_pythons_autograd_layer(method, options):
    """With gradients on it has to run."""
    model, entered = tokred.apply(tiny("deit"), method, **options).eval(), []

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_filename.endswith("torch/_library/autograd.py"):
            entered.append(frame.f_code.co_name)

    def forward():
        entered.clear()
        sys.setprofile(watch)
        try:
            return model(images())
        finally:
            sys.setprofile(None)

    with torch.no_grad():
        quick = forward()
    assert not entered
    logits = forward()
    assert entered and logits.requires_grad
    torch.testing.assert_close(logits.detach(), quick)
