"""Folders of photographs as data sets, in an order that stays when images are added."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .images import SUFFIXES, open_image

SAMPLES = "samples"  # scikit-learn's two photographs


@dataclass(frozen=True)
class Dataset:
    """A name, image files, and their classes: folders of images, sorted, as in ImageNet's layout; none: no classes."""

    name: str
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def load(self, indices: Sequence[int], transform) -> tuple[Tensor, np.ndarray]:
        """Pixels [B, 3, H, W] of the images and their BLAKE2b [B, 2] uint64.

        Raises:
            UserError: a file that is gone or no image.
        """
        pixels, digests = [], []
        for index in indices:
            path = self.files[index]
            pixels.append(transform(open_image(path)))
            digests.append(np.frombuffer(hashlib.blake2b(path.read_bytes(), digest_size=16).digest(), "<u8"))
        return torch.stack(pixels), np.stack(digests)

    def labels_for(self, classes: int) -> np.ndarray:
        """[n] int32: the labels for a model of so many classes, -1 if the folders are not those."""
        known = len(self.classes) == classes
        return np.array(self.labels if known else [-1] * len(self.files), np.int32)


def find(folders: Sequence[str]) -> list[Dataset]:
    """A data set for each folder, by its name; none: scikit-learn's photographs.

    Raises:
        UserError: no folder, one without images, or two of one name.
    """
    found = [_folder(Path(folder)) for folder in folders] or [_samples()]
    names = [dataset.name for dataset in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two data sets of the name {name}: rename a folder")
    return found


def settle(dataset: Dataset, path: Path, recorded: int) -> Dataset:
    """The data set in the order of the list at `path`, images that are new behind it; saves the list.

    Args:
        recorded: so many images of the list have a place in records; later ones that are gone by now leave it.

    Raises:
        UserError: the class folders are others than they were, or the list is damaged.
    """
    if path.exists():
        before = read(path)
        if before.classes != dataset.classes:
            raise UserError(f"the class folders of {dataset.name} are others than when {path} was written")
        there = dict(zip(dataset.files, dataset.labels, strict=True))
        listed = dict(zip(before.files, before.labels, strict=True))
        order = {file: label for i, (file, label) in enumerate(listed.items()) if i < recorded or file in there}
        order |= there
        dataset = Dataset(dataset.name, tuple(order), tuple(order.values()), dataset.classes)
    saved = {"classes": dataset.classes, "files": [str(file) for file in dataset.files], "labels": dataset.labels}
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(saved))
    os.replace(fresh, path)
    return dataset


def read(path: Path) -> Dataset:
    """The data set whose list was saved at `path`, in a folder of its name.

    Raises:
        UserError: the list is damaged.
    """
    try:
        saved = json.loads(path.read_text())
        files, labels = tuple(map(Path, saved["files"])), tuple(saved["labels"])
        return Dataset(path.parent.name, files, labels, tuple(saved["classes"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _folder(path: Path) -> Dataset:
    if not path.is_dir():
        raise UserError(f"no such folder of images: {path}")
    path = path.resolve()
    if files := _images(path):
        return Dataset(path.name, files, (-1,) * len(files), ())
    classes = [(folder.name, _images(folder)) for folder in sorted(path.iterdir()) if folder.is_dir()]
    classes = [(name, files) for name, files in classes if files]
    if not classes:
        raise UserError(f"no image in {path} or in its folders ({', '.join(SUFFIXES)})")
    files = tuple(file for _, inside in classes for file in inside)
    labels = tuple(label for label, (_, inside) in enumerate(classes) for _ in inside)
    return Dataset(path.name, files, labels, tuple(name for name, _ in classes))


def _images(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES))


def _samples() -> Dataset:
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError(
            "the sample photographs need scikit-learn: pip install scikit-learn, or name a folder"
        ) from None
    files = _images(Path(sklearn.datasets.__file__).parent / "images")
    return Dataset(SAMPLES, files, (-1,) * len(files), ())
