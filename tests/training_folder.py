"""A folder of small images to train on, and settings of a training of seconds."""

import numpy as np
import torch
from PIL import Image

from tokred_kernels.training.distributed import World
from tokred_kernels.training.settings import Settings

CPU = World(torch.device("cpu"))
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


def picture(path, label, seed):
    """A square whose colour is the label, somewhere in noise."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
    row, column = rng.integers(0, 20, 2)
    x[row : row + 12, column : column + 12, label] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


def write(root, train=24):
    """Images to train on, and 11 to evaluate, of three classes."""
    for split, count in (("train", train), ("val", 11)):
        for n in range(count):
            picture(root / split / "rgb"[n % 3] / f"{n}.png", n % 3, n)
    return root


def settings(folder, output, **more):
    """A training of seconds."""
    small = dict(epochs=2, batch_size=8, lr=1e-3, model_options=SMALL, smoothing=0.1, scale=0.5)
    return Settings(**{"model": "test_vit", "data": str(folder), "output": str(output), **small, **more})
