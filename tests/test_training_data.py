"""The published layouts of NABirds, COCO 2014 and NUS-WIDE, on synthetic folders, and their labels that do not fit."""

import json
from dataclasses import replace

import pytest
import torch
from timm.loss import AsymmetricLossMultiLabel
from torchvision.transforms.functional import pil_to_tensor
from training_folder import CPU, picture, settings

from tokred_kernels.training import build, data, loop
from tokred_kernels.training.settings import BadInput


def nabirds(root, labels=("817", "295", "817", "295"), split="1010"):
    ids = [f"0000139e-{n:04d}" for n in range(4)]
    for n, image in enumerate(ids):
        picture(root / "images" / "0817" / f"{image}.jpg", n % 2, n)
    write = {
        "images": [f"{image} 0817/{image}.jpg" for image in ids],
        "image_class_labels": [f"{image} {label}" for image, label in zip(ids, labels, strict=True)],
        "train_test_split": [f"{image} {part}" for image, part in zip(ids, split, strict=True)],
        "classes": ["0 Birds", "295 Greater Scaup", "817 Oak Titmouse"],
    }
    for name, lines in write.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def coco(root, category=18):
    """Categories 1 and 18, with a gap; an image of both, one of the second twice, one of none."""
    (root / "annotations").mkdir()
    for split, first in (("train", 0), ("val", 20)):
        images = [{"id": first + n, "file_name": f"COCO_{split}2014_{first + n:012d}.jpg"} for n in (3, 1, 2)]
        for n, image in enumerate(images):
            picture(root / f"{split}2014" / image["file_name"], n, n)
        found = [(1, 1), (1, category), (2, 18), (2, 18)]
        record = {
            "images": images,
            "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
            "annotations": [{"image_id": first + n, "category_id": c} for n, c in found],
        }
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(record))
    return root


def nuswide(root, label="['sky', 'water']"):
    rows = ["filepath,label,split_name"]
    for n, (labels, split) in enumerate(
        ((label, "train"), ("['sky']", "train"), ("[]", "train"), ("['water']", "val"))
    ):
        picture(root / "images" / f"{n}.jpg", n % 3, n)
        rows.append(f'images/{n}.jpg,"{labels}",{split}')
    (root / "nus_wid_data.csv").write_text("\n".join(rows) + "\n")
    return root


def named(split):
    return [(path.name.removesuffix(".jpg")[-4:], label) for path, label in split.samples]


def test_nabirds(tmp_path):
    nabirds(tmp_path)
    train, val = (data.read(tmp_path, "nabirds", split) for split in ("train", "val"))
    assert train.classes == val.classes == ["Greater Scaup", "Oak Titmouse"] and not train.multi_label
    assert named(train) == [("0000", 1), ("0002", 1)] and named(val) == [("0001", 0), ("0003", 0)]


def test_coco(tmp_path):
    coco(tmp_path)
    train, val = (data.read(tmp_path, "coco", split) for split in data.SPLITS)
    assert train.classes == val.classes == ["person", "dog"] and train.multi_label
    assert named(train) == [("0001", (0, 1)), ("0002", (1,)), ("0003", ())] and named(val)[2] == ("0023", ())


def test_nuswide(tmp_path):
    train, val = (
        data.read(nuswide(tmp_path) if split == "train" else tmp_path, "nuswide", split) for split in data.SPLITS
    )
    assert train.classes == val.classes == ["sky", "water"] and train.multi_label
    assert [label for _, label in train.samples] == [(0, 1), (0,), ()] and [label for _, label in val.samples] == [(1,)]


WRONG = {
    "nabirds without files": ("nabirds", lambda root: None, "is not in the format nabirds: .*images.txt"),
    "nabirds label": (
        "nabirds",
        lambda root: nabirds(root, labels=("817", "1999", "817", "295")),
        "the label 1999 of the image 0000139e-0001 is not in classes.txt",
    ),
    "nabirds split": ("nabirds", lambda root: nabirds(root, split="0000"), "no image in the split train"),
    "coco without files": ("coco", lambda root: None, "is not in the format coco: .*instances_train2014.json"),
    "coco label": ("coco", lambda root: coco(root, category=99), "the label 99 of the image 1 is no category"),
    "nuswide without files": ("nuswide", lambda root: None, "has no .csv with the columns filepath, label, split_name"),
    "nuswide label": (
        "nuswide",
        lambda root: nuswide(root, "['sky']"),
        "the label 'water' of the image .* is on no",
    ),
    "nuswide code": ("nuswide", lambda root: nuswide(root, "exit(3)"), "is not in the format nuswide: ValueError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_out_of_range_and_missing_files_are_one_line(name, tmp_path):
    form, make, said = WRONG[name]
    make(tmp_path)
    with pytest.raises(BadInput, match=said) as error:
        data.read(tmp_path, form, "train")
    assert "\n" not in str(error.value)


def test_several_labels_become_weights(tmp_path):
    images = data.Images(data.read(coco(tmp_path), "coco", "train"), pil_to_tensor)
    assert [images[n][1].tolist() for n in range(3)] == [[1, 1], [0, 1], [0, 0]]
    pixels, labels, unreadable = data.collate([images[0], (None, None, "why"), images[2]])
    assert pixels.shape == (2, 3, 32, 32) and labels.tolist() == [[1, 1], [0, 0]] and unreadable == ["why"]


def test_training_on_several_labels(tmp_path):
    coco(tmp_path)
    said = settings(tmp_path, tmp_path / "run", format="coco", method="topk", options=dict(keep_rate=0.5, stages=[1]))
    rows = loop.train(replace(said, batch_size=2, mixup=0.2), CPU)
    assert 0 < rows[-1]["mAP"] <= 100 and "top1" not in rows[-1]
    loss = build.criterion(said, data.read(tmp_path, "coco", "train"))
    assert isinstance(loss, AsymmetricLossMultiLabel) and (loss.gamma_neg, loss.gamma_pos, loss.clip) == (4, 0, 0.05)
    logits = torch.tensor([[0.0, 0.0]])  # p = 1/2: -ln .5, and .45^4 times -ln .55 for what is not there
    assert loss(logits, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.6931472 + 0.45**4 * 0.5978370)
    with pytest.raises(BadInput, match="the consistency loss of mctf needs one class an image; --consistency 0"):
        loop.train(replace(said, method="mctf", options=dict(r=2)), CPU)
