"""tokred analyze: records of every setting, resumed after a kill byte for byte, and bad input in one line."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_cli import ROOT, one_line

from benchmarks import photographs as photographs_of_packages
from benchmarks import study_records
from tokred_kernels import analysis
from tokred_kernels.analysis.record import HEADER_BYTES
from tokred_kernels.cli import main

MODEL = "test_vit"  # timm's smallest: 6 blocks of 100 patches, width 64, 1000 classes
RUN = [
    "--model",
    MODEL,
    "--method",
    "topk,tome",
    "--keep-rate",
    ".5,.7",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--no-report",
]
NAMES = [f"{MODEL}.{name}.record" for name in ("dense", "tome.0.5", "tome.0.7", "topk.0.5", "topk.0.7")]


def photographs(folder, n: int, first: int = 0):
    """Pictures of blurred noise, each a seed of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        noise = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


def analyze(output, *argv) -> None:
    assert main(["analyze", *map(str, argv), *RUN, "-o", str(output)]) == 0


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder of 10 photographs, and the records of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("analyze")
    photos = photographs(folder / "birds", 10)
    analyze(folder / "whole", photos)
    return photos, folder / "whole" / "birds"


def test_records_are_complete_and_comparable(recorded):
    photos, folder = recorded
    assert sorted(contents(folder)) == ["images.json", *NAMES]
    records = [analysis.Record(folder / name) for name in NAMES]
    analysis.check_comparable(records)
    for record in records:
        record.verify()
        header = record.header
        assert len(record) == 10 and header.dataset == "birds" and header.weights == "random (seed 0)"
        assert (header.depth, header.grid, header.feature_blocks) == (6, [10, 10], [1, 3, 4, 5])
        assert header.blocks == ([] if header.method == "dense" else [1, 3, 4])
        assert (record.rows["label"] == -1).all()
        if header.method == "topk":
            left = {0.5: (50, 25, 12), 0.7: (70, 49, 34)}[header.keep_rate]
            for block, count in zip((1, 3, 4), left, strict=True):
                assert (analysis.kept(record.pattern(block)).sum(1) == count).all()
    assert json.loads((folder / "images.json").read_text())["files"] == [str(photos / f"{i:02}.png") for i in range(10)]


def test_what_is_there_is_not_run_again(recorded, monkeypatch):
    photos, folder = recorded
    before = contents(folder)
    monkeypatch.setattr("tokred_kernels.analysis.observed.observe", None)
    analyze(folder.parent, photos)
    assert contents(folder) == before


def test_a_killed_run_goes_on_byte_for_byte(recorded, tmp_path):
    photos, whole = recorded
    command = [sys.executable, "-m", "tokred_kernels", "analyze", str(photos), *RUN, "-o", str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first = tmp_path / "birds" / NAMES[0]
    while running.poll() is None and not (first.exists() and first.stat().st_size > HEADER_BYTES):
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    with open(first, "ab") as file:
        file.write(b"half a row")
    assert contents(tmp_path / "birds") != contents(whole)
    analyze(tmp_path, photos)
    assert contents(tmp_path / "birds") == contents(whole)


def test_images_that_are_added_come_behind_the_others(recorded, tmp_path):
    _, whole = recorded
    grown = photographs(tmp_path / "birds", 9, first=1)
    analyze(tmp_path / "out", grown)
    photographs(grown, 1)  # sorts before the others
    analyze(tmp_path / "out", grown)
    files = json.loads((tmp_path / "out" / "birds" / "images.json").read_text())["files"]
    assert files == [str(grown / f"{i % 10:02}.png") for i in range(1, 11)]
    for name in NAMES:
        found, want = analysis.Record(tmp_path / "out" / "birds" / name), analysis.Record(whole / name)
        order = np.arange(1, 11) % 10
        np.testing.assert_array_equal(found.rows["image"], want.rows["image"][order])
        np.testing.assert_array_equal(found.rows["pattern"], want.rows["pattern"][order])


def test_a_broken_image_can_be_taken_away(recorded, tmp_path, capsys):
    """It stops the run that reaches it; without it the run goes on."""
    _, whole = recorded
    photos = photographs(tmp_path / "birds", 10)
    broken = photos / "05.broken.png"
    broken.write_text("no image")
    assert main(["analyze", str(photos), *RUN, "-o", str(tmp_path / "out")]) == 2
    assert str(broken) in one_line(capsys)
    broken.unlink()
    analyze(tmp_path / "out", photos)
    for name in NAMES:
        assert (tmp_path / "out" / "birds" / name).read_bytes() == (whole / name).read_bytes()


def test_folders_of_classes_are_labels_where_the_model_has_as_many(tmp_path, monkeypatch):
    import timm

    photographs(tmp_path / "set" / "cat", 2)
    photographs(tmp_path / "set" / "dog", 1, first=2)
    (tmp_path / "set" / "empty").mkdir()
    analyze(tmp_path / "out", tmp_path / "set")
    assert analysis.Record(tmp_path / "out" / "set" / NAMES[0]).rows["label"].tolist() == [-1] * 3
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=2))
    analyze(tmp_path / "two", tmp_path / "set")
    assert analysis.Record(tmp_path / "two" / "set" / NAMES[0]).rows["label"].tolist() == [0, 0, 1]


def test_every_method_leaves_out_what_the_model_cannot(tmp_path, capsys):
    argv = ["analyze", "--model", MODEL, "--keep-rate", ".5", "--no-report", "-o", str(tmp_path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "test_vit, radial was left out: radial: rings need a fixed grid" in out
    assert f"{tmp_path}: 13 records" in out
    assert len(analysis.Record(tmp_path / "samples" / "test_vit.evit.0.5.record")) == 2


BAD = {
    "no output": (["--model", MODEL], "--output"),
    "unknown model": (["--model", "deit_smal_patch16_224", "-o", "out"], "deit_small_patch16_224"),
    "no VisionTransformer": (["--model", "resnet18", "-o", "out"], "ResNet"),
    "unknown method": (["--model", MODEL, "--method", "topk,magic", "-o", "out"], "magic"),
    "method twice": (["--model", MODEL, "--method", "topk,topk", "-o", "out"], "topk is given twice"),
    "method that the model refuses": (["--model", MODEL, "--method", "radial", "-o", "out"], "radial: rings need"),
    "keep rate above 1": (["--model", MODEL, "--keep-rate", "1.5", "-o", "out"], "keep_rate must be in (0, 1]"),
    "keep rate is no number": (["--model", MODEL, "--keep-rate", "half", "-o", "out"], "--keep-rate"),
    "stage beyond the model": (["--model", MODEL, "--stages", "9", "-o", "out"], "stages must be below 6"),
    "features beyond the model": (["--model", MODEL, "--features", "6", "-o", "out"], "--features must be below 6"),
    "batch of nothing": (["--model", MODEL, "--batch-size", "0", "-o", "out"], "--batch-size"),
    "missing folder": (["/nowhere/birds", "--model", MODEL, "-o", "out"], "/nowhere/birds"),
    "folder without images": (["bare", "--model", MODEL, "-o", "out"], "no image in"),
    "no image": (["broken", "--model", MODEL, "-o", "out"], "text.png"),
    "two folders of a name": (["a/birds", "b/birds", "--model", MODEL, "-o", "out"], "two data sets of the name birds"),
    "folder without a model": (["birds", "-o", "out"], "name a --model"),
    "nothing to do": (["--no-report", "-o", "out"], "name a --model"),
    "nothing to report on": (["-o", "out"], "no records in out"),
    "a reserved name": (["a/tables", "--model", MODEL, "-o", "out"], "must not be named tables"),
    "output is a file": (["birds", "--model", MODEL, "-o", "file"], "cannot write file"),
    "too many GPUs": (["--model", MODEL, "--device", "cuda:99", "-o", "out"], "cuda:99"),
}


@pytest.mark.parametrize(("argv", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("birds", "a/birds", "b/birds", "a/tables"):
        photographs(tmp_path / folder, 1)
    for folder in ("bare", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "text.png").write_text("no image")
    (tmp_path / "file").touch()
    assert main(["analyze", *argv]) == 2
    assert named in one_line(capsys)
    assert all(len(analysis.Record(path)) == 0 for path in tmp_path.glob("out/*/*.record"))


class TestInTheWay:
    """Of records that are there already."""

    @pytest.fixture
    def there(self, recorded, tmp_path):
        photos, folder = recorded
        (tmp_path / "birds").mkdir()
        for name, data in contents(folder).items():
            (tmp_path / "birds" / name).write_bytes(data)
        return photos, tmp_path

    def refused(self, there, named, capsys, *more) -> None:
        photos, output = there
        assert main(["analyze", str(photos), *RUN, *more, "-o", str(output)]) == 2
        assert named in one_line(capsys)

    def test_other_weights(self, there, capsys):
        self.refused(there, "was recorded with weights 'random (seed 0)', not 'random (seed 1)'", capsys, "--seed", "1")

    def test_other_stages(self, there, capsys):
        self.refused(there, "was recorded with options", capsys, "--stages", "2,3,4")

    def test_no_record(self, there, capsys):
        (there[1] / "birds" / NAMES[2]).write_text("notes")
        self.refused(there, f"{NAMES[2]} is no record of this version", capsys)

    def test_another_process(self, there, capsys):
        path = there[1] / "birds" / NAMES[1]
        with analysis.Writer(path, analysis.Record(path).header):
            self.refused(there, f"another process records {path}", capsys)

    def test_a_damaged_list(self, there, capsys):
        (there[1] / "birds" / "images.json").write_text("{}")
        self.refused(there, "images.json is damaged", capsys)


def test_trained_models_are_recorded_for_the_report(tmp_path, monkeypatch):
    """What make report adds, here untrained; what is there is left."""
    monkeypatch.setattr(study_records.study, "_train", lambda *_: None)
    study_records.write(tmp_path, methods=("topk",))
    records = [analysis.Record(path) for path in sorted((tmp_path / "digits").glob("*.record"))]
    analysis.check_comparable(records)
    assert [record.header.keep_rate for record in records] == [None, 0.3, 0.5, 0.7]
    assert all(len(record) == 360 and record.header.grid == [6, 6] for record in records)
    assert set(records[0].rows["label"]) == set(range(10))
    listed = json.loads((tmp_path / "digits" / "images.json").read_text())
    with Image.open(listed["files"][0]) as image:
        assert image.size == (12, 12)
    before = contents(tmp_path / "digits")
    study_records.write(tmp_path, methods=("evit",))
    assert contents(tmp_path / "digits") == before


def test_photographs_of_packages_are_cut_into_seven(tmp_path, monkeypatch):
    sources = {"scenes": (("sklearn/datasets/images", ("china.jpg", "flower.jpg")),)}
    monkeypatch.setattr(photographs_of_packages, "SOURCES", sources)
    photographs_of_packages.write(tmp_path)
    names = sorted(path.name for path in (tmp_path / "scenes").iterdir())
    assert names == sorted(f"{n}-{name}.png" for n in range(7) for name in ("china", "flower"))
    with (
        Image.open(tmp_path / "scenes" / "3-china.png") as crop,
        Image.open(tmp_path / "scenes" / "0-china.png") as whole,
    ):
        np.testing.assert_array_equal(crop, np.asarray(whole)[: crop.height, -crop.width :])
