"""Images and labels from folders as they are published, through timm's transforms.

folder     root/{train,val}/<class>/**/<image>: ImageNet's layout
nabirds    root/{classes,images,image_class_labels,train_test_split}.txt and root/images/
coco       root/annotations/instances_{train,val}2014.json, root/{train,val}2014/: several labels an image
nuswide    root/nus_wide_{train,val}.csv or one .csv with the columns filepath, label, split_name: several labels
"""

import ast
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .settings import BadInput

SPLITS = ("train", "val")
MULTI_LABEL = ("coco", "nuswide")


@dataclass(frozen=True)
class Split:
    """The images of one split: (path, label), a class index or, where multi_label, the indices of all its classes."""

    samples: list[tuple[Path, int | tuple[int, ...]]]
    classes: list[str]
    multi_label: bool = False


def read(root: str | Path, form: str, split: str) -> Split:
    """Lists a split; no image is opened.

    Raises:
        BadInput: a file or folder is missing or holds nothing, or a label is not among the classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"no such folder of data: {root}")
    try:
        found = _READERS[form](root, split)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{root} is not in the format {form}: {type(error).__name__}: {error}") from None
    except OSError as error:
        raise BadInput(f"{root} is not in the format {form}: {error}") from None
    if not found.samples:
        raise BadInput(f"{root}: no image in the split {split}")
    return found


def _read_folder(root: Path, split: str) -> Split:
    from timm.data.readers.reader_image_folder import find_images_and_targets

    for name in dict.fromkeys(("train", split)):
        if not (root / name).is_dir():
            raise BadInput(f"{root} has no folder {name}/ with a folder for each class")
    classes = _class_folders(root / "train")
    own = _class_folders(root / split)
    for missing, what in ((set(classes) - set(own), split), (set(own) - set(classes), "train")):
        if missing:
            raise BadInput(f"{root / what} has no folder for the class {_few(missing)}")
    index = {name: i for i, name in enumerate(classes)}
    samples = []
    for name in classes:
        images, _ = find_images_and_targets(str(root / split / name), class_to_idx=None)
        if not images:
            raise BadInput(f"no image in the folder {root / split / name}")
        samples += [(Path(path), index[name]) for path, _ in images]
    return Split(samples, classes)


def _class_folders(folder: Path) -> list[str]:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not found:
        raise BadInput(f"{folder} has no class folders")
    return found


def _read_nabirds(root: Path, split: str) -> Split:
    """Images belong to 555 of 1011 names of a hierarchy, by ids with gaps: those in use, in ascending order."""
    pairs = {
        name: dict(line.split(maxsplit=1) for line in (root / f"{name}.txt").read_text().splitlines() if line.strip())
        for name in ("images", "image_class_labels", "train_test_split", "classes")
    }
    labels = pairs["image_class_labels"]
    used = sorted(set(labels.values()), key=int)
    for image, label in labels.items():
        if label not in pairs["classes"]:
            raise BadInput(f"{root}: the label {label} of the image {image} is not in classes.txt")
    index = {label: i for i, label in enumerate(used)}
    wanted = "1" if split == "train" else "0"
    chosen = [image for image in pairs["images"] if pairs["train_test_split"][image] == wanted]
    samples = [(root / "images" / pairs["images"][image], index[labels[image]]) for image in chosen]
    return Split(samples, [pairs["classes"][label] for label in used])


def _read_coco(root: Path, split: str) -> Split:
    """Images without any object have no labels, and stay."""
    record = json.loads((root / "annotations" / f"instances_{split}2014.json").read_text())
    categories = sorted(record["categories"], key=lambda c: c["id"])
    index = {category["id"]: i for i, category in enumerate(categories)}
    labels: dict[int, set[int]] = {image["id"]: set() for image in record["images"]}
    for entry in record["annotations"]:
        if entry["category_id"] not in index:
            raise BadInput(f"{root}: the label {entry['category_id']} of the image {entry['image_id']} is no category")
        labels[entry["image_id"]].add(index[entry["category_id"]])
    samples = [
        (root / f"{split}2014" / image["file_name"], tuple(sorted(labels[image["id"]])))
        for image in sorted(record["images"], key=lambda i: i["id"])
    ]
    return Split(samples, [category["name"] for category in categories], multi_label=True)


def _read_nuswide(root: Path, split: str) -> Split:
    """The classes are those of the training images, in alphabetical order."""
    rows = []
    for file in sorted(root.glob("*.csv")):
        with file.open(newline="") as lines:
            rows += list(csv.DictReader(lines))
    if not rows:
        raise BadInput(f"{root} has no .csv with the columns filepath, label, split_name")
    named = [(row["split_name"], row["filepath"], ast.literal_eval(row["label"])) for row in rows]
    classes = sorted({label for part, _, labels in named if part == "train" for label in labels})
    index = {label: i for i, label in enumerate(classes)}
    samples = []
    for part, path, labels in named:
        for label in labels:
            if label not in index:
                raise BadInput(f"{root}: the label {label!r} of the image {path} is on no training image")
        if part == split:
            samples.append((root / path, tuple(sorted({index[label] for label in labels}))))
    return Split(samples, classes, multi_label=True)


_READERS = {"folder": _read_folder, "nabirds": _read_nabirds, "coco": _read_coco, "nuswide": _read_nuswide}


def _few(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


class Images(Dataset):
    """(pixels [3, H, W], label or weights [classes], None), or (None, None, why) where a file is no image."""

    def __init__(self, split: Split, transform):
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Tensor | None, str | None]:
        from PIL import Image

        path, label = self.split.samples[index]
        try:
            with Image.open(path) as image:
                pixels = self.transform(image.convert("RGB"))
        # Pillow raises these for unknown, cut-off and oversized files; SyntaxError for broken PNG chunks.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return None, None, f"cannot read the image {path}: {' '.join(str(error).split())}"
        if not self.split.multi_label:
            return pixels, torch.tensor(label), None
        weights = torch.zeros(len(self.split.classes))
        weights[list(label)] = 1
        return pixels, weights, None


def collate(batch: list[tuple]) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """The images that could be read, or None, and why the others could not."""
    unreadable = [why for *_, why in batch if why is not None]
    whole = [(pixels, label) for pixels, label, why in batch if why is None]
    if not whole:
        return None, None, unreadable
    pixels, labels = zip(*whole, strict=True)
    return torch.stack(pixels), torch.stack(labels), unreadable


def loader(images: Images, batch_size: int, sampler: Sampler, workers: int, drop_last: bool) -> DataLoader:
    return DataLoader(
        images,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
    )
