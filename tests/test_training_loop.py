"""`tokred train` and `tokred eval`: what they write, and that a stopped training goes on bit for bit."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import training_folder
import vits
import yaml
from training_folder import CPU, SMALL, settings

import tokred_kernels
from tokred_kernels.cli import main
from tokred_kernels.training import build, checkpoint, data, loop
from tokred_kernels.training.distributed import World
from tokred_kernels.training.evaluate import evaluate, mean_average_precision
from tokred_kernels.training.settings import BadInput, Settings
from tokred_kernels.training.watch import Watch

ROOT = Path(tokred_kernels.__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_folder.write(tmp_path_factory.mktemp("data"))


METHODS = {
    "dense": {},
    "metr": dict(method="metr", options=dict(keep_rate=0.5, stages=[1])),
    "metr, exits inside": dict(
        method="metr", options=dict(keep_rate=0.5, stages=[1]), exits=(0, 1), exit_at="post_attn", checkpointing=True
    ),
    "mctf": dict(method="mctf", options=dict(r=3)),
    "dynamicvit": dict(method="dynamicvit", options=dict(keep_rate=0.5, stages=[1]), amp=True),
    "evit, warmed up": dict(
        method="evit",
        options=dict(keep_rate=0.5, stages=[1]),
        keep_rate_from=1,
        keep_rate_epochs=2,
        mixup=0.8,
        cutmix=1.0,
    ),
    "average": dict(
        method="tome", options=dict(r=2), ema=0.9, accumulate=2, clip_grad=1.0, augment="rand-m9", erase=0.5
    ),
}


def same(a, b):
    """Two checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Stop(Watch):
    """Dies like a process that is killed, at an update of an epoch."""

    def __init__(self, epoch, update):
        super().__init__()
        self.when, self.now, self.updates = (epoch, update), -1, 0

    def begin(self, what, total):
        if what.startswith("epoch"):
            self.now, self.updates = self.now + 1, 0

    def advance(self, **figures):
        self.updates += "lr" in figures
        if (self.now, self.updates) == self.when:
            raise SystemExit


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_training_goes_on_bit_for_bit(name, folder, tmp_path, capsys):
    said = settings(folder, tmp_path / "whole", epochs=3, **METHODS[name])
    rows = loop.train(said, CPU)
    assert [row["epoch"] for row in rows] == [0, 1, 2] and all(row["images"] == 24 for row in rows)
    stopped = dataclasses.replace(said, output=str(tmp_path / "stopped"))
    with pytest.raises(SystemExit):
        loop.train(stopped, CPU, watch=Stop(1, 2))
    assert len(checkpoint.load(tmp_path / "stopped" / "last.pt")["rows"]) == 1
    loop.train(stopped, CPU, resume=True)
    whole, resumed = (checkpoint.load(tmp_path / run / "last.pt") for run in ("whole", "stopped"))
    assert whole.pop("settings")["output"] != resumed.pop("settings")["output"]
    assert same(whole, resumed)
    assert (tmp_path / "whole" / "log.csv").read_text() == (tmp_path / "stopped" / "log.csv").read_text()
    assert all(np.isfinite(row["loss"]) for row in rows)
    if name == "average":
        assert not same(whole["ema"], whole["model"]) and "ema_top1" in rows[0]
        evaluated = ["eval", str(tmp_path / "whole"), "--data", str(folder), "--rounds", "0", "--ema"]
        assert main(evaluated) == 0
        assert f"top1 {rows[-1]['ema_top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metr", "mctf"])
def test_a_compiled_training_is_the_same(name, folder, tmp_path, monkeypatch):
    """By Dynamo's graphs, run as they are; MCTF's r of the second pass is another one at every step."""
    compiled = []
    plain = torch.nn.Module.compile

    def traced(self):
        compiled.append(self)
        plain(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    runs = [settings(folder, tmp_path / str(yes), epochs=1, compile=yes, **METHODS[name]) for yes in (False, True)]
    torch._dynamo.reset()
    rows = [loop.train(said, CPU) for said in runs]
    assert len(compiled) == 1 and rows[0] == rows[1]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_killed_with_9_it_goes_on_bit_for_bit(folder, tmp_path):
    argv = ["train", "--model", "test_vit", "--data", str(folder), "--batch-size", "8", "--seed", "3"]
    argv += [f"--model-option={name}={value}" for name, value in SMALL.items()]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "tokred_kernels", *argv, "--epochs", "500", "--output", str(killed)]
    threads = str(torch.get_num_threads())  # sums depend on it
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    try:
        while not (killed / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(checkpoint.load(killed / "last.pt")["rows"])
    assert 0 < done < 400
    said = Settings(**{**checkpoint.load(killed / "last.pt")["settings"], "exits": ()})
    for run, resume in ((killed, True), (whole, False)):
        start = done if resume else 0
        with pytest.raises(SystemExit):
            loop.train(dataclasses.replace(said, output=str(run)), CPU, resume=resume, watch=Stop(done + 1 - start, 1))
    a, b = (checkpoint.load(run / "last.pt") for run in (killed, whole))
    assert len(a["rows"]) == done + 1
    assert same({**a, "settings": None}, {**b, "settings": None})


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"rows": [1]})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BadInput, match=r"cannot save .*last.pt: .*No space left"):
            checkpoint.save(path, {"rows": [1, 2]})
    assert checkpoint.load(path) == {"rows": [1]}
    order = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: order.append("fsync"))
        patch.setattr(Path, "replace", lambda self, target: order.append(f"{self.name} -> {target.name}"))
        checkpoint.save(path, {})
    assert order == ["fsync", "last.pt.part -> last.pt", "fsync"]


class Poison(Watch):
    """Makes a weight NaN in the second epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def epoch(self, row):
        self.epochs += 1
        self.training.model.head.weight.data.fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(folder, tmp_path):
    watch = Poison()
    watch.training = loop.Training(settings(folder, tmp_path), CPU, watch)
    with pytest.raises(
        BadInput, match=r"train: the loss is not finite in epoch 2; .*last.pt is from the end of epoch 1"
    ):
        watch.training.run(False)
    state = checkpoint.load(tmp_path / "last.pt")
    assert len(state["rows"]) == 1 and all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_sharded_evaluation_counts_every_image_once(folder, size):
    split = data.read(folder, "folder", "val")
    model = build.objective(settings(folder, "x"), split).model
    images = build.held_out(split, model)
    whole = evaluate(model, images, CPU, batch_size=4)
    assert whole["images"] == 11
    total = {"images": 0, "top1": 0.0}
    for rank in range(size):
        world = Shard(CPU.device, rank, size)
        if rank >= len(images):
            with pytest.raises(BadInput, match="no image could be read"):
                evaluate(model, images, world, batch_size=2)
            continue
        part = evaluate(model, images, world, batch_size=2)
        total = {"images": total["images"] + part["images"], "top1": total["top1"] + part["images"] * part["top1"]}
    assert total["images"] == 11 and total["top1"] == pytest.approx(11 * whole["top1"])


class Shard(World):
    """One process of several, alone."""

    def total(self, x):
        return x

    def gather(self, value):
        return [value]


def test_evaluation_counts_the_tokens_of_each_image(folder):
    split = data.read(folder, "folder", "val")
    model = build.objective(settings(folder, "x", method="ats", options=dict(keep_rate=0.5, stages=[1])), split).model
    vits.randomised(model)
    images = build.held_out(split, model)
    found = evaluate(model, images, CPU, batch_size=4, count_tokens=True)
    with torch.no_grad(), tokred_kernels.trace(model.eval()) as t:
        model(torch.stack([images[n][0] for n in range(11)]))
    assert found["tokens"] == pytest.approx(t.counts.double().mean(0).tolist())
    assert found["tokens"][0] == 17 and 1 < found["tokens"][-1] < 9


def test_unreadable_images_are_named_skipped_and_counted(folder, tmp_path, capfd):
    root = tmp_path / "data"
    for path in folder.rglob("*.png"):
        target = root / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    (root / "train" / "r" / "broken.png").write_bytes(b"no image")
    (root / "val" / "g" / "cut.png").write_bytes((folder / "val" / "g" / "1.png").read_bytes()[:99])
    argv = ["train", "--data", str(root), "--config", str(tmp_path / "c.yaml"), "--batch-size", "5"]
    config = {
        "model": "test_vit",
        "epochs": 2,
        "model_option": SMALL,
        "method": "topk",
        "keep_rate": 0.5,
        "stages": [1],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "batch_size": 99}))
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    out, err = capfd.readouterr()
    assert err.count("broken.png: ") == 1 and err.count("cut.png: ") == 1 and err.count("; skipped") == 2
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert {row["skipped"] for row in rows} == {"1"} and {row["images"] for row in rows} == {"24"}
    assert out.count("epoch ") == 2
    assert main([*argv, "--output", str(tmp_path / "strict"), "--strict-images"]) == 2
    assert "cannot read the image" in capfd.readouterr().err
    assert (
        main(["eval", str(tmp_path / "run"), "--data", str(root), "--rounds", "1", "--json", str(tmp_path / "e.json")])
        == 0
    )
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["images"], found["skipped"], found["tokens"]) == (11, 1, [17, 17, 9])
    assert found["top1"] == pytest.approx(float(rows[-1]["top1"])) and found["macs"] < found["dense_macs"]
    assert found["timing"]["topk"]["re_sdpa"] > 0
    assert main(["eval", str(tmp_path / "run"), "--data", str(root), "--strict-images"]) == 2


def test_map_is_sklearns_over_the_classes_that_are_there():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.6, 0.5], [0.1, 0.7, 0.5]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=bool)
    # Class 0: hits at ranks 1 and 3: (1 + 2/3) / 2. Class 1: a hit at rank 2: 1/2. Class 2 has none.
    assert mean_average_precision(scores, labels) == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)


def test_shares_to_keep_are_those_of_the_schedule(folder):
    options = dict(keep_rate=0.5, stages=[0, 1])
    found = build.objective(
        settings(folder, "x", method="dynamicvit", options=options), data.read(folder, "folder", "val")
    )
    assert found.rates == [8 / 16, 4 / 16]


def test_200_images_are_learnt_with_metr(tmp_path, capsys):
    training_folder.write(tmp_path / "data", train=200)
    argv = [
        "--data",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "run"),
        "--method",
        "metr",
        "--keep-rate",
        "0.5",
    ]
    argv += [
        "--stages",
        "1",
        "--model",
        "test_vit",
        *(f"--model-option={name}={value}" for name, value in SMALL.items()),
    ]
    argv += [
        "--epochs",
        "12",
        "--batch-size",
        "20",
        "--lr",
        "2e-3",
        "--scale",
        "1",
        "--smoothing",
        "0",
        "--drop-path",
        "0",
    ]
    assert main(["train", *argv]) == 0
    log = ["eval", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--split", "train", "--rounds", "0"]
    assert main(log) == 0
    out = capsys.readouterr().out
    assert "test_vit, metr keep_rate=0.5, stages=[1]: 200 images of train, 0 skipped" in out
    assert "top1 100.00 %" in out and "tokens 17 -> 10" in out
