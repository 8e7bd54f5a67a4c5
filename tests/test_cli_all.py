"""`tokred bench --method all`: one row for every method of the registry at every keep rate."""

import json

import pytest
import timm
import torch
from PIL import Image
from torch.library import Library

from tokred_kernels import methods, reference
from tokred_kernels.cli import main
from tokred_kernels.methods import METHODS

MODEL = "test_vit"  # timm's smallest: 6 blocks of 100 patches, width 64
RATES = (0.9, 0.5)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """One small run: what it saved. The grid is fixed: radial refuses the model that takes any."""
    folder = tmp_path_factory.mktemp("all")
    create = timm.create_model
    threads = torch.get_num_threads()
    argv = ["bench", MODEL, "--method", "all", "--keep-rate", ".9,.5", "--rounds", "2", "--threads", "1"]
    files = ["--json", str(folder / "a.json"), "--plot", str(folder / "a.png")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: create(name, dynamic_img_size=False, **options))
        assert main([*argv, "--batch-size", "3", "--device", "cpu", *files]) == 0
    torch.set_num_threads(threads)
    with Image.open(folder / "a.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 500
    return json.loads((folder / "a.json").read_text())


def test_every_method_has_a_row_at_every_rate(record):
    assert [(row["keep_rate"], row["method"]) for row in record["rows"]] == [(k, m) for k in RATES for m in METHODS]
    assert record["stages"] == [1, 3, 4] and record["agreement"]["passed"]
    dense = record["macs"]["dense"]
    for row in record["rows"]:
        assert row["agreement"]["passed"] and row["agreement"]["wrong"] == 0
        assert row["tokens"][0] == 101 and row["tokens"][-1] < 101 and row["macs"] < dense
        assert row["ideal_speedup"] == pytest.approx(dense / row["macs"]) and row["rounds"] == 2
        oracle = 3 / row["oracle_images_per_second"]
        assert row["images_per_second"] == pytest.approx(3 / row["seconds_median"])
        assert row["reduction_seconds"] == pytest.approx(row["seconds_median"] - oracle)


def test_methods_keep_the_same_counts(record):
    """90, 81, 72 and 50, 25, 12 of 100 patches; a fused token counts as one, and half is all that may merge at once."""
    for row in record["rows"]:
        left = [n - 1 for n in row["tokens"][1:]]
        want = {0.9: [90, 81, 72], 0.5: [50, 25, 12]}[row["keep_rate"]]
        fused = METHODS[row["method"]](**row["options"]).fuses
        stages = [left[1], left[3], left[4]] if row["method"] != "kmedoids" else [left[0], left[2], left[3]]
        if row["method"] in ("ats", "radial"):  # at most, and rings
            assert all(n <= k + 4 for n, k in zip(stages, want, strict=True))
        else:
            assert all(k <= n <= k + 1 + fused for n, k in zip(stages, want, strict=True)), (row["method"], left)


def test_one_oracle_serves_methods_of_equal_counts(record):
    speeds = {(row["macs"], row["oracle_images_per_second"]) for row in record["rows"]}
    assert len(speeds) < len(record["rows"])


class _Refuses(methods.TopK):
    def check(self, model):
        raise ValueError("refuses: this is no model for me")


def test_a_method_that_refuses_the_model_is_left_out_with_its_reason(monkeypatch, capsys):
    registry = {"topk": METHODS["topk"], "mine": _Refuses}
    monkeypatch.setattr(methods, "METHODS", registry)
    argv = ["bench", MODEL, "--method", "all", "--keep-rate", ".5", "--rounds", "1", "--device", "cpu"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "mine was left out: refuses: this is no model for me" in out and out.count("topk") == 1


def test_a_wrong_kernel_is_named_and_its_methods_are_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(methods, "METHODS", {name: METHODS[name] for name in ("tome", "topk")})
    override = Library("tokred", "IMPL")
    override.impl(
        "add_topk_gather_norm",
        lambda x, branch, score, *args, **kwargs: reference.add_topk_gather_norm(x, branch, -score, *args, **kwargs),
        "CPU",
        allow_override=True,
    )
    argv = ["bench", MODEL, "--method", "all", "--keep-rate", ".5", "--rounds", "1", "--device", "cpu"]
    try:
        assert main([*argv, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]) == 1
    finally:
        override._destroy()
    tome, topk = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert tome["agreement"]["passed"] and "speedup" in tome
    assert not topk["agreement"]["passed"] and "speedup" not in topk
    assert capsys.readouterr().out.count("wrong") == 1
