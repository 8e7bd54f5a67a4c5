"""Every bad input of `tokred train` and `tokred eval`: one line, status 2, nothing lost."""

import copy
import dataclasses

import pytest
import torch
import training_folder
from training_folder import CPU, SMALL, picture, settings

from tokred_kernels.cli import main
from tokred_kernels.training import build, checkpoint, data, loop
from tokred_kernels.training.settings import BadInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_folder.write(tmp_path_factory.mktemp("data"))


BAD = {
    "no model": (dict(model=""), "--model is needed"),
    "unknown model": (dict(model="test_vitt"), "timm has no model 'test_vitt'"),
    "bad model option": (dict(model_options={"magic": 1}), "cannot create the model test_vit: TypeError"),
    "no data": (dict(data="/nowhere"), "no such folder of data: /nowhere"),
    "no epochs": (dict(epochs=0), "epochs must be at least 1, got 0"),
    "no learning rate": (dict(lr=float("nan")), "lr must be above 0, got nan"),
    "too much smoothing": (dict(smoothing=1.5), "smoothing must be at most 0.99, got 1.5"),
    "all warm-up": (dict(warmup_epochs=2), "warmup_epochs must be below epochs, 2, got 2"),
    "batch too large": (dict(batch_size=32), "24 images do not fill a batch of 32"),
    "batch in odd pieces": (dict(batch_size=8, accumulate=3), "must be a multiple of processes x accumulate, 3"),
    "mixup of odd batches": (dict(batch_size=9, mixup=1.0), "mixup and cutmix mix pairs, a forward has 9 images"),
    "unknown optimiser": (dict(opt="magic"), "timm has no optimiser 'magic'"),
    "unknown method": (dict(method="magic"), "unknown method 'magic'"),
    "stage beyond the model": (dict(method="topk", options=dict(keep_rate=0.5)), "stages must be below 2"),
    "exits of another method": (dict(exits=(1,)), "exits are metr's, the method is None"),
    "exit beyond the model": (
        dict(method="metr", options=dict(keep_rate=0.5, stages=[1]), exits=(9,)),
        "add_exits: blocks must be below 2",
    ),
    "no keep rate to warm up": (
        dict(method="tome", options=dict(r=1), keep_rate_epochs=1),
        "a keep rate that comes down needs one --keep-rate",
    ),
    "two beginnings": (dict(init="a.pt", pretrained=True), "give either --init or --pretrained"),
    "no beginning": (dict(init="/nowhere/a.pt"), "no such checkpoint: /nowhere/a.pt"),
    "graphs without end": (
        dict(method="evit", options=dict(keep_rate=0.5), keep_rate_epochs=1, compile=True),
        "every rate is a graph",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line(name, folder, tmp_path):
    change, said = BAD[name]
    with pytest.raises(BadInput) as error:
        loop.train(settings(folder, tmp_path, **change), CPU)
    assert said in str(error.value) and not (tmp_path / "last.pt").exists()


def test_bad_folders_are_one_line(folder, tmp_path):
    def refused(said, split="val"):
        with pytest.raises(BadInput, match=said):
            data.read(tmp_path, "folder", split)

    refused("has no folder train/ with a folder for each class")
    (tmp_path / "train").mkdir()
    refused("has no class folders", "train")
    for name in "abcdef":
        picture(tmp_path / "train" / name / "1.png", 0, 0)
    refused("has no folder val/")
    picture(tmp_path / "val" / "a" / "1.png", 0, 0)
    refused("val has no folder for the class b, c, d and 2 more")
    for name in "bcdefg":
        (tmp_path / "val" / name).mkdir()
    refused("train has no folder for the class g")
    (tmp_path / "val" / "g").rmdir()
    refused("no image in the folder .*val/b")


def test_checkpoints_that_do_not_fit_are_one_line(folder, tmp_path):
    said = settings(folder, tmp_path / "run", epochs=1)
    with pytest.raises(BadInput, match="no such checkpoint"):
        loop.train(said, CPU, resume=True)
    loop.train(said, CPU)
    with pytest.raises(BadInput, match=r"last\.pt is the checkpoint of a training; --resume goes on with it"):
        loop.train(said, CPU)
    wide = dataclasses.replace(said, model_options={**SMALL, "embed_dim": 64})
    with pytest.raises(
        BadInput, match=r"of another model: cls_token is \[1, 1, 32\], the model's \[1, 1, 64\], .* more$"
    ):
        loop.train(wide, CPU, resume=True)
    deep = dataclasses.replace(said, model_options={**SMALL, "depth": 3})
    with pytest.raises(BadInput, match=r"last\.pt is of another model: blocks\.2\.norm1\.weight is missing"):
        loop.train(deep, CPU, resume=True)
    with pytest.raises(BadInput, match="--ema disagree on whether there is an average"):
        loop.train(dataclasses.replace(said, ema=0.9), CPU, resume=True)
    (tmp_path / "run" / "last.pt").write_bytes(b"PK no checkpoint")
    with pytest.raises(BadInput, match=r"last\.pt is no checkpoint: "):
        loop.train(said, CPU, resume=True)
    torch.save({"rows": []}, tmp_path / "run" / "last.pt")
    with pytest.raises(
        BadInput, match="is no checkpoint of a training: it has no classes, ema, model, optimizer, teacher"
    ):
        loop.train(said, CPU, resume=True)


def test_fine_tuning_starts_from_the_weights_of_another_training(folder, tmp_path):
    loop.train(settings(folder, tmp_path / "dense", epochs=1), CPU)
    init = dict(init=str(tmp_path / "dense" / "last.pt"))
    reduced = settings(folder, "x", method="metr", options=dict(keep_rate=0.5, stages=[1]), **init)
    own = build.objective(reduced, data.read(folder, "folder", "train")).model
    before = checkpoint.load(init["init"])["model"]
    assert all(torch.equal(t, own.state_dict()[name]) for name, t in before.items())
    assert list(own.tokred_exits) == ["1"]
    torch.save({"model": {**before, "mid_heads.1.0.weight": torch.ones(32)}}, tmp_path / "published.pt")
    with pytest.raises(BadInput, match=r"load_published: the weights do not fit .*heads.1.0.bias is missing"):
        build.dense_model(settings(folder, "x", init=str(tmp_path / "published.pt")), 3)
    torch.save({"model": before}, tmp_path / "published.pt")
    other = build.dense_model(settings(folder, "x", init=str(tmp_path / "published.pt")), 3)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in before.items())
    with_exits = {**own.state_dict()}
    checkpoint.load_weights(copy.deepcopy(own), with_exits, "x")
    plain = build.dense_model(settings(folder, "x"), 3)
    checkpoint.load_weights(plain, with_exits, "x")
    assert not hasattr(plain, "tokred_exits")


CLI = {
    "no data": (["train", "--model", "test_vit"], "--data is needed"),
    "unknown model": (["train", "--model", "test_vitt", "--data", ".", "--output", "x"], "close: test_vit"),
    "options without a method": (["train", "--keep-rate", "0.5"], "options of a method need --method"),
    "bad option": (["train", "--method", "tome", "--keep-rate", "2"], "keep_rate must be in (0, 1]"),
    "bad number": (["train", "--epochs", "many"], "--epochs"),
    "bad format": (["train", "--format", "video"], "--format"),
    "nothing to resume": (["train", "--output", "/nowhere", "--resume"], "no such checkpoint: /nowhere/last.pt"),
    "resume what": (["train", "--resume"], "--resume needs --output"),
    "no configuration": (["train", "--config", "/nowhere.yaml"], "cannot read the configuration /nowhere.yaml"),
    "device that is none": (
        ["train", "--model", "test_vit", "--data", ".", "--output", "x", "--device", "tpu"],
        "the device must be cpu or cuda, got 'tpu'",
    ),
    "evaluate what": (["eval", "test_vitt", "--data", "."], "close: test_vit"),
    "evaluate without data": (["eval", "test_vit", "--data", "/nowhere"], "no such folder of data"),
    "batch of nothing": (["eval", "test_vit", "--data", ".", "--batch-size", "0"], "--batch-size must be at least 1"),
}


@pytest.mark.parametrize("name", CLI)
def test_bad_input_is_one_line_and_status_2(name, capsys):
    argv, said = CLI[name]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tokred: ") and err.count("\n") == 1 and said in err, err


def test_labels_out_of_range_and_broken_configurations(folder, tmp_path, capsys):
    assert main(["eval", "test_vit", "--data", str(folder)]) == 2
    assert "the labels are out of range: 3 classes, the model has 1000" in capsys.readouterr().err
    path = tmp_path / "c.yaml"
    for text, said in (
        ("- a", "must be a mapping of names to values"),
        ("a: [", "cannot read the configuration"),
        ("magic: 1", f"{path}: unrecognized arguments: --magic=1"),
        ("epochs: many", f"{path}: argument --epochs: invalid int value: 'many'"),
    ):
        path.write_text(text)
        assert main(["train", "--config", str(path)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fewer_gpus_than_asked(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    argv = ["train", "--model", "test_vit", "--data", ".", "--output", "x", "--device", "cuda"]
    assert main(argv) == 2
    assert "4 processes want a GPU each, torch sees 0" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(argv) == 2 and capsys.readouterr().err == ""
