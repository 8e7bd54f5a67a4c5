"""Photographs as model input: files, folders, or the two that scikit-learn ships, through timm's own transforms."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def load(paths: Sequence[str], model: nn.Module) -> tuple[list[str], Tensor]:
    """The names of the images and their pixels [B, 3, H, W], as `model` wants them.

    Args:
        paths: image files and folders of them (sorted, not searched deeper); none: scikit-learn's two photographs.

    Raises:
        UserError: a path that is missing, a folder without images, a file that is not an image.
    """
    import timm.data

    photographs = [(str(path), open_image(path)) for path in _files(paths)] if paths else _samples()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return [name for name, _ in photographs], torch.stack([transform(image) for _, image in photographs])


def photographs(pixels: Tensor, model: nn.Module) -> list:
    """What `model` sees in pixels [B, 3, H, W] from `load`, as Pillow's images."""
    import timm.data
    from PIL import Image

    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    values = ((pixels * std + mean) * 255).round().clamp(0, 255).byte()
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in values]


def _files(paths: Sequence[str]) -> list[Path]:
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"no image in the folder {path} ({', '.join(SUFFIXES)})")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"no such image: {path}")
    return files


def open_image(path: Path):
    """The photograph as Pillow's RGB image; UserError if the file is missing or none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow raises these for unknown, cut-off and oversized files; SyntaxError for broken PNG chunks.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from None


def _samples():
    from PIL import Image

    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError(
            "the sample photographs need scikit-learn: pip install scikit-learn, or name an image"
        ) from None
    samples = load_sample_images()
    return [
        (Path(name).name, Image.fromarray(pixels))
        for name, pixels in zip(samples.filenames, samples.images, strict=True)
    ]
