"""The page and the plot of `make study`, and what the training step's benchmark counts."""

import math

import pytest
import torch
from vits import images, tiny

import tokred_kernels as tokred
from benchmarks import noise_free, study, training_step
from tokred_kernels import schedule
from tokred_kernels.models.baselines import oracle_model


def figures():
    """Two seeds whose every accuracy is 90 and 92."""
    names = [f"{base} {keep}" for base in ("dense", "exits") for keep in (1, *study.KEEP)]
    names += [f"{base} tuned {keep}" for base in ("dense", "exits") for keep in study.KEEP]
    names += ["mctf untuned", "mctf", "mctf consistent"]
    names += [f"{method} {keep}" for method in study.SELECTION for keep in study.KEEP]
    return [dict.fromkeys(names, value) for value in (90.0, 92.0)]


def test_the_page_has_every_mean_and_deviation(tmp_path):
    text = study.page(figures())
    cells = 2 * (1 + 2 * len(study.KEEP)) + 3 + len(study.SELECTION) * len(study.KEEP)
    assert text.count(f"91.0 ± {math.sqrt(2):.1f}") == cells
    assert all(f"| {method} |" in text for method in study.SELECTION) and "2 seeds" in text
    study.plot(figures(), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_a_split_holds_every_digit_once():
    x, y, test_x, test_y = study._digits(0)
    assert (len(x), len(test_x)) == (1437, 360) and len(y) + len(test_y) == 1797
    assert x.shape[1:] == (1, 12, 12) and -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1
    assert not torch.equal(test_y, study._digits(1)[3])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tome", dict(r=6)),
        ("mctf", dict(r=6)),
        ("evit", dict(keep_rate=0.5, stages=(1, 2))),
        ("topk", dict(tokens=[25] * 4)),
    ],
)
def test_training_keeps_no_matrix_of_tokens(method, options):
    model = tokred.apply(tiny("deit"), method, **options).train()
    counts = {n for pair in schedule.tokens(model) for n in pair}
    assert not counts & {8, 16, 32, 96, 128}  # widths of the model, which its weights have
    shapes = noise_free.saved_shapes(lambda: model(images()))
    assert any(shape[-2:] == (37, 32) for shape in shapes)
    assert training_step.matrices(shapes, counts) == 0
    logits = torch.rand(2, 2, 37, 37, requires_grad=True)
    assert training_step.matrices(noise_free.saved_shapes(lambda: logits.softmax(-1)), counts) == 1


@pytest.mark.parametrize(
    ("method", "options"), [("tome", dict(r=6)), ("mctf", dict(r=6)), ("evit", dict(keep_rate=0.5, stages=(1, 2)))]
)
def test_a_step_of_training_holds_no_more_than_its_oracle(method, options):
    """MCTF, which normalises twice, would hold 11 % more if it kept both."""
    model = tokred.apply(tiny("deit"), method, **options).train()
    models = model, oracle_model(tiny("deit"), schedule.tokens(model)).train()
    peak, oracle = (noise_free.peak_bytes(training_step._step(m, images(6))) for m in models)
    assert peak <= 1.05 * oracle


def test_peak_bytes_are_held_at_once():
    def call():
        a = torch.ones(1 << 18)
        del a
        b = torch.ones(1 << 19)
        return torch.ones(1 << 17) + b[: 1 << 17]

    assert noise_free.peak_bytes(call) == 4 * ((1 << 19) + 2 * (1 << 17))
