"""The published recipes in recipes/, read by `tokred train` and run on data sets of seconds."""

import dataclasses
from pathlib import Path

import pytest
import test_training_data as published
import torch
import training_folder
from training_folder import CPU, SMALL, settings

from tokred_kernels.cli import main
from tokred_kernels.training import build, checkpoint, data

RECIPES = Path(__file__).parent.parent / "recipes"
SHORT = ["--model", "test_vit", "--no-pretrained", "--epochs", "1", "--warmup-epochs", "0", "--accumulate", "1"]
SHORT += ["--batch-size", "2", "--no-amp", *(f"--model-option={k}={v}" for k, v in SMALL.items())]
METHODS = {
    "dynamicvit": ["--method", "dynamicvit", "--stages", "1"],
    "evit": ["--method", "evit", "--stages", "1", "--keep-rate", "0.7", "--keep-rate-from", "0"],
    "mctf": ["--method", "mctf", "--r", "3"],
    "metr": ["--method", "metr", "--stages", "1", "--keep-rate", "0.7"],
}


def trained(recipe, root, form, output, *more):
    """The checkpoint of an epoch by the recipe, on the smallest model."""
    argv = ["--config", str(RECIPES / f"{recipe}.yaml"), "--data", str(root), "--format", form, "--output", str(output)]
    assert main(["train", *argv, *SHORT, *more]) == 0
    return checkpoint.load(output / "last.pt")


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"wttu", *METHODS}


@pytest.mark.parametrize("recipe", METHODS)
def test_recipes_train(recipe, tmp_path, capsys):
    state = trained(
        recipe, training_folder.write(tmp_path / "data", train=6), "folder", tmp_path / "run", *METHODS[recipe]
    )
    said = state["settings"]
    assert said["method"] == recipe and said["repeats"] == 3 and said["augment"] == "rand-m9-mstd0.5-inc1"
    assert state["rows"][0]["images"] == 6 and "top1" in state["rows"][0]


@pytest.mark.parametrize("form", ["folder", "nabirds", "coco", "nuswide"])
def test_which_tokens_to_use_trains_on_its_four_data_sets(form, tmp_path, capsys):
    make = {"folder": lambda root: training_folder.write(root, train=6)}.get(form) or getattr(published, form)
    (tmp_path / "data").mkdir()
    method = ["--method", "topk", "--keep-rate", "0.7", "--stages", "1", "--option", "rule=wttu"]
    state = trained("wttu", make(tmp_path / "data"), form, tmp_path / "run", *method)
    said, row = state["settings"], state["rows"][0]
    assert said["options"] == {"keep_rate": 0.7, "stages": [1], "rule": "wttu"}
    assert (said["lr"], said["ema"], said["mixup"], said["cutmix"]) == (5e-4, 0.99996, 0.8, 1.0)
    measure = "mAP" if form in ("coco", "nuswide") else "top1"
    assert {measure, f"ema_{measure}"} <= row.keys() and row["images"] > 0


@pytest.mark.parametrize("size", [1, 2])
def test_repeated_augmentation_takes_a_part_of_the_images_three_times(size, tmp_path):
    split = data.read(training_folder.write(tmp_path / "data"), "folder", "train")
    said = settings(tmp_path / "data", tmp_path, repeats=3)
    model = build.objective(said, split).model
    seen = []
    for rank in range(size):
        sampler = build.training_data(said, split, model, dataclasses.replace(CPU, rank=rank, size=size)).sampler
        sampler.set_epoch(5)
        seen.append(list(sampler))
        assert list(sampler) == seen[-1]
        sampler.set_epoch(6)
        assert list(sampler) != seen[-1]
    together = torch.tensor(seen).T.flatten()  # in the order of updates: the same for any number of processes
    assert len(together) == 24 and (together.view(8, 3) == together.view(8, 3)[:, :1]).all()
    assert len(together.unique()) == 8
