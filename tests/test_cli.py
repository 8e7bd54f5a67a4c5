"""The `tokred` command: every bad input in one line with exit status 2, and a small run end to end."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokred_kernels
from tokred_kernels import methods
from tokred_kernels.cli import main, method_options

MODEL = "test_vit"  # timm's smallest: 6 blocks of 100 patches, width 64
ROOT = Path(tokred_kernels.__file__).parent.parent


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def broken_images(tmp_path):
    """A folder without images, and files that are none."""
    from PIL import Image

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def one_line(capsys) -> str:
    """What a refused command said: nothing on stdout, one line on stderr."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokred: ") and err.count("\n") == 1, err
    return err


BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["dance"], "dance"),
    "no model": (["bench"], "MODEL"),
    "unknown option": (["bench", MODEL, "--fast"], "--fast"),
    "unknown model": (["bench", "deit_smal_patch16_224"], "deit_small_patch16_224"),
    "no VisionTransformer": (["bench", "resnet18"], "ResNet"),
    "windowed model": (["bench", "swin_tiny_patch4_window7_224"], "SwinTransformer"),
    "unknown method": (["bench", MODEL, "--method", "magic"], "magic"),
    "r is no number": (["bench", MODEL, "--r", "many"], "--r"),
    "r is fractional": (["bench", MODEL, "--r", "1.5"], "--r"),
    "r is negative": (["bench", MODEL, "--r", "-1"], "-1"),
    "r list with a negative": (["bench", MODEL, "--r=4,-4"], "-4"),
    "inflection too steep": (["bench", MODEL, "--r", "4", "--inflection", "2"], "inflection"),
    "inflection of a list": (["bench", MODEL, "--r", "4,4", "--inflection", "1"], "r must be"),
    "keep rate is no number": (["bench", MODEL, "--method", "evit", "--keep-rate", "half"], "--keep-rate"),
    "keep rate above 1": (["bench", MODEL, "--method", "evit", "--keep-rate", "1.5"], "keep_rate must be in (0, 1]"),
    "r and keep rate": (["bench", MODEL, "--r", "3", "--keep-rate", "0.5"], "tome: give one of r=, keep_rate="),
    "r of evit": (["bench", MODEL, "--method", "evit", "--r", "5"], "evit has no option 'r'"),
    "stage beyond the model": (["bench", MODEL, "--method", "topk"], "stages must be below 6"),
    "stages in disorder": (["bench", MODEL, "--method", "topk", "--stages", "3,1"], "ascending"),
    "stage is no number": (["bench", MODEL, "--method", "topk", "--stages", "first"], "--stages"),
    "unknown rule": (["bench", MODEL, "--method", "topk", "--option", "rule=mine"], "rule must be one of evit, wttu"),
    "unknown scores": (["bench", MODEL, "--method", "topk", "--option", "scores=max"], "scores must be"),
    "rate and tokens": (
        ["bench", MODEL, "--method", "metr", "--tokens", "9,9,9", "--keep-rate", "0.5"],
        "give either keep_rate= or tokens=",
    ),
    "option without a value": (["bench", MODEL, "--option", "prop_attn"], "must be NAME=VALUE, got 'prop_attn'"),
    "option without a name": (["bench", MODEL, "--option", "=5"], "must be NAME=VALUE, got '=5'"),
    "option of another method": (["bench", MODEL, "--option", "fuse=True"], "tome has no option 'fuse'"),
    "option of another type": (["bench", MODEL, "--option", "prop_attn=yes"], "True or False, got 'yes'"),
    "option that is code": (["bench", MODEL, "--option", "prop_attn=exit(3)"], "True or False, got 'exit(3)'"),
    "option too deep": (["bench", MODEL, "--option", "prop_attn=" + "(" * 10_000], "prop_attn must be True or False"),
    "option twice": (["bench", MODEL, "--option", "r=3", "--option", "r=4"], "option r is given twice"),
    "option and flag": (["bench", MODEL, "--r", "3", "--option", "r=4"], "option r is given twice"),
    "all methods with one r": (["bench", MODEL, "--method", "all", "--r", "3"], "not --r"),
    "all methods with an option": (["bench", MODEL, "--method", "all", "--option", "fuse=False"], "not --option"),
    "all methods at 0": (
        ["bench", MODEL, "--method", "all", "--keep-rate", ".5,0"],
        "keep_rate must be in (0, 1], got 0",
    ),
    "all methods of a ResNet": (["bench", "resnet18", "--method", "all"], "VisionTransformer, got ResNet"),
    "all methods of a windowed model": (
        ["bench", "swin_tiny_patch4_window7_224", "--method", "all"],
        "SwinTransformer",
    ),
    "all methods at a stage beyond the model": (
        ["bench", MODEL, "--method", "all", "--stages", "9"],
        "stages must be below 6",
    ),
    "no class token": (
        ["bench", "vit_medium_patch16_gap_240", "--method", "evit"],
        'no class token to score by; use scores="mean"',
    ),
    "missing image": (["bench", MODEL, "--image", "/nowhere/cat.jpg"], "/nowhere/cat.jpg"),
    "no such device": (["bench", MODEL, "--device", "quantum"], "quantum"),
    "device that is none": (["bench", MODEL, "--device", "mps"], "mps"),
    "too many GPUs": (["bench", MODEL, "--device", "cuda:99"], "cuda:99"),
    "unknown dtype": (["bench", MODEL, "--dtype", "int8"], "int8"),
    "batch of nothing": (["bench", MODEL, "--batch-size", "0"], "--batch-size"),
    "no rounds": (["bench", MODEL, "--rounds", "0"], "--rounds"),
    "no threads": (["bench", MODEL, "--threads", "none"], "--threads"),
    "json in no folder": (["bench", MODEL, "--json", "/nowhere/a.json"], "/nowhere/a.json"),
    "json is a folder": (["bench", MODEL, "--json", "/"], "folder"),
    "plot is no PNG": (["bench", MODEL, "--plot", "a.jpg"], "a.jpg"),
}


@pytest.mark.parametrize(("argv", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2(argv, named, capsys):
    assert main(argv) == 2
    assert named in one_line(capsys)


@pytest.mark.parametrize("name", ["folder", "text.png", "empty.jpg", "cut.png"])
def test_broken_image_is_one_line_and_status_2(name, broken_images, capsys):
    assert main(["bench", MODEL, "--image", str(broken_images / name)]) == 2
    assert name in one_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_one_line_and_status_2(capsys):
    assert main(["bench", MODEL, "--device", "cuda"]) == 2
    assert "CUDA" in one_line(capsys)


def test_no_network_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tokred_kernels", "bench", MODEL, "--pretrained"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"tokred: no pretrained weights for {MODEL}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["timm", "rich", "matplotlib"])
def test_missing_package_is_one_line_and_status_2(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    assert main(["bench", MODEL, "--plot", "a.png"]) == 2
    assert missing in one_line(capsys)


def test_info_and_help_import_neither_timm_nor_triton():
    script = """
import sys
from tokred_kernels import methods
from tokred_kernels.cli import main, method_options
assert main(["info"]) == 0
try:
    main(["--help"])
except SystemExit as done:
    assert done.code == 0
print([m for m in ("timm", "triton", "rich", "scipy", "matplotlib", "torchvision") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info.keys() == {"versions", "cpu", "gpus", "ops", "not_running"}
    assert info["versions"]["torch"] == torch.__version__
    assert info["cpu"]["isa"] == torch.ops.tokred.cpu_isa()
    assert all(set(runs) == {"cpu", "cuda"} for runs in info["ops"].values())
    assert len(info["gpus"]) == torch.cuda.device_count()


def test_info_names_every_op_and_every_reason(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    info = tokred_kernels.info()
    for reason in info.pop("reasons").values():
        assert reason in text
    assert all(op in text for op in info)


@pytest.fixture(scope="module")
def bench_run(tmp_path_factory):
    """One small run: its record, its plot and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    command = ["bench", MODEL, "--r", "13", "--rounds", "2", "--threads", "1", "--batch-size", "3", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "tokred_kernels", *command, "--json", "a.json", "--plot", "a.png"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "a.json").read_text()), folder / "a.png", done


def test_bench_checks_before_it_times(bench_run):
    agreed = bench_run[0]["agreement"]
    assert agreed["passed"]
    assert agreed["steps"] == 6  # one a block
    assert agreed["wrong"] == 0
    assert agreed["step_error"] < 1e-6
    assert min(agreed["cosine_with"].values()) > 0.999
    assert agreed["cosine_with"].keys() == {"reference", "plain"}


def test_bench_record_holds_what_the_table_shows(bench_run):
    record = bench_run[0]
    assert record.keys() == {
        *("model", "method", "options", "weights", "images", "image_size", "batch_size", "device", "dtype", "machine"),
        *("tokens", "macs", "ideal_speedup", "agreement", "timing"),
    }
    assert record["tokens"] == [101, 88, 75, 62, 49, 36, 23]
    assert record["images"] == ["china.jpg", "flower.jpg"]
    assert record["weights"] == "random (seed 0)"
    assert record["machine"]["cpu"]["threads"] == 1
    assert record["ideal_speedup"] == pytest.approx(record["macs"]["dense"] / record["macs"]["reduced"])
    timing = record["timing"]
    assert timing.keys() == {"dense", "tome", "oracle", "oracle_self", "plain_sdpa", "plain_explicit"}
    for row in timing.values():
        assert row["rounds"] == 2
        assert row["images_per_second"] == pytest.approx(3 / row["seconds_median"])
    assert timing["dense"]["speedup"] == 1 and timing["dense"]["re_sdpa"] is None


def test_bench_text_fits_a_terminal_and_says_what_was_run(bench_run):
    done = bench_run[2]
    assert done.stderr == ""  # no bar where there is no terminal
    table = [line for line in done.stdout.splitlines() if line.startswith((" dense", " tome", " oracle"))]
    assert len(table) == 6
    assert max(map(len, table)) <= 80
    assert "…" not in done.stdout
    for said in ("random (seed 0) weights", "1 thread", "near-ties", "RE"):
        assert said in done.stdout


def test_bench_plot_is_a_png(bench_run):
    from PIL import Image

    with Image.open(bench_run[1]) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 500


def test_bench_takes_files_and_folders(tmp_path, capsys):
    from PIL import Image

    for name in ("b.png", "a.JPG"):
        Image.effect_noise((80, 60), 50).save(tmp_path / name)  # greyscale: becomes RGB
    Image.new("RGBA", (32, 200), "blue").save(tmp_path / "clear.webp")
    saved = tmp_path / "out.json"
    command = ["bench", MODEL, "--image", str(tmp_path), str(tmp_path / "b.png"), "--r", "9,0,3", "--rounds", "1"]
    assert main([*command, "--device", "cpu", "--json", str(saved)]) == 0
    record = json.loads(saved.read_text())
    assert [Path(name).name for name in record["images"]] == ["a.JPG", "b.png", "clear.webp", "b.png"]
    assert record["batch_size"] == 4
    assert record["tokens"] == [101, 92, 92, 89, 89, 89, 89]


def test_bench_in_bfloat16_with_a_slope(capsys):
    argv = ["bench", MODEL, "--r", "8", "--inflection", "-1", "--dtype", "bfloat16", "--rounds", "1", "--device", "cpu"]
    assert main(argv) == 0
    assert "bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "tokens"),
    [
        (["--method", "topk"], [101, 101, 71, 71, 50, 50, 35]),
        (["--method", "evit", "--keep-rate", ".5"], [101, 101, 52, 52, 28, 28, 16]),
        (["--method", "metr", "--tokens", "60,30,3"], [101, 101, 62, 62, 32, 32, 5]),
    ],
)
def test_bench_of_methods_that_select(argv, tokens, tmp_path, capsys):
    saved = tmp_path / "out.json"
    argv = ["bench", MODEL, *argv, "--stages", "1,3,5", "--rounds", "1", "--device", "cpu", "--threads", "1"]
    assert main([*argv, "--json", str(saved), "--plot", str(tmp_path / "out.png")]) == 0
    record = json.loads(saved.read_text())
    assert record["tokens"] == tokens and record["options"]["stages"] == [1, 3, 5]
    agreed = record["agreement"]
    assert agreed["passed"] and agreed["steps"] == 3 and agreed["wrong"] == 0 and 0 < agreed["attention_error"] <= 1
    assert min(agreed["cosine_with"].values()) > 0.999 and agreed["cosine_with"].keys() == {"reference", "plain"}
    method = argv[3]
    assert {"dense", method, "oracle", "plain_sdpa", "plain_explicit"} <= record["timing"].keys()


def test_an_option_is_a_literal_or_text(monkeypatch):
    """Every field of a method can be given, also of one that has flags for none of them."""

    @dataclasses.dataclass(frozen=True)
    class Mine:
        width: int
        names: tuple = ()
        update: str = "textbook"
        equal: bool = False
        tiny: float = 1.0

    monkeypatch.setitem(methods.METHODS, "mine", Mine)
    parser = argparse.ArgumentParser()
    method_options.add_arguments(parser)
    assert "mine: width, names, update, equal, tiny" in parser.epilog
    given = ["width=3", "names=('a', 'b')", "update=wttu", "equal=True", "tiny=1e-3"]
    args = parser.parse_args(["--method", "mine", *(word for one in given for word in ("--option", one))])
    want = dict(width=3, names=("a", "b"), update="wttu", equal=True, tiny=1e-3)
    assert method_options.chosen(args) == want


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--method", "tome"], {"r": 13}),
        (["--method", "tome", "--inflection", "-1"], {"r": (13, -1)}),
        (["--method", "topk"], {"keep_rate": 0.7}),
        (
            ["--method", "topk", "--option", "keep_rate=[0.9, 0.5]", "--stages", "1,3"],
            {"keep_rate": [0.9, 0.5], "stages": [1, 3]},
        ),
        (["--method", "metr", "--tokens", "9,8,7"], {"tokens": [9, 8, 7]}),
    ],
)
def test_how_much_to_remove_has_a_default(argv, options):
    parser = argparse.ArgumentParser()
    method_options.add_arguments(parser)
    assert method_options.chosen(parser.parse_args(argv)) == options
