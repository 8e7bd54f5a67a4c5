"""Records of trained models, for the report: `python -m benchmarks.study_records DIR`.

The ViT of `benchmarks.study` learns scikit-learn's digits and is fine-tuned with each method at every keep rate. What
each does to the 360 test digits goes to DIR/digits, where `tokred analyze -o DIR` finds it: here labels are known, and
images enough for CCA. Nothing is trained if they are there.
"""

import argparse
import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

import tokred_kernels as tokred
from tokred_kernels import analysis
from tokred_kernels.cli import compare, recording

from . import study

METHODS = ("tome", "topk", "evit", "mctf", "radial", "kmedoids", "dpcknn", "sit", "patchmerger", "sinkhorn", "ats")
NAME, MODEL, SEED = "digits", "vit_digits", 0
FEATURES = (1, 3, 5)


def write(folder: Path, methods: Sequence[str] = METHODS) -> None:
    """Trains, and writes the records and, last, the list of the images."""
    folder = folder / NAME
    listed = folder / recording.LIST
    if listed.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*{recording.SUFFIX}"):
        old.unlink()
    torch.set_num_threads(1)
    x, y, test_x, test_y = study._digits(SEED)
    files = _save(test_x, folder / "images")

    torch.manual_seed(SEED)
    base = timm.create_model("vit_tiny_patch16_224", **study.SHAPE)
    nn.init.normal_(base.pos_embed, std=0.5)
    study._train(base, x, y, study._plain, study.EPOCHS, study.RATE, SEED)
    dense = tokred.apply(copy.deepcopy(base), "tome", r=0)
    _record(folder, dense, recording.DENSE, None, {}, test_x, test_y, files)
    settings = [(method, rate) for method in methods for rate in study.KEEP]
    for method, rate in track(settings, "fine-tuning"):
        options = compare.options(method, base, rate, study.STAGES)
        torch.manual_seed(SEED)
        model = tokred.apply(copy.deepcopy(base), method, **options)
        study._train(model, x, y, study._plain, study.TUNING, study.TUNING_RATE, SEED)
        _record(folder, model, method, rate, options, test_x, test_y, files)
    saved = {"classes": list(map(str, range(10))), "files": list(map(str, files)), "labels": test_y.tolist()}
    listed.write_text(json.dumps(saved))


def _save(images: Tensor, folder: Path) -> list[Path]:
    """The images [n, 1, H, W] in [-1, 1] as PNG files."""
    folder.mkdir(exist_ok=True)
    files = [folder.resolve() / f"{number:03}.png" for number in range(len(images))]
    for file, values in zip(files, ((images[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy(), strict=True):
        Image.fromarray(values).save(file)
    return files


def _record(
    folder: Path,
    model: nn.Module,
    method: str,
    rate: float | None,
    options: dict,
    x: Tensor,
    y: Tensor,
    files: list[Path],
) -> None:
    model.eval()
    weights = recording.fingerprint(model.named_parameters())
    header = analysis.Header(
        dataset=NAME,
        model=MODEL,
        weights=f"trained (seed {SEED})",
        depth=len(model.blocks),
        grid=list(model.patch_embed.grid_size),
        prefix=model.num_prefix_tokens,
        feature_blocks=FEATURES,
        width=model.embed_dim,
        **{**recording.of_method(model, method, rate, options, weights), "untrained": False},
    )
    found = analysis.observe(model, x, header.blocks, FEATURES)
    digests = [np.frombuffer(hashlib.blake2b(f.read_bytes(), digest_size=16).digest(), "<u8") for f in files]
    rate = "" if rate is None else f".{rate:g}"
    with analysis.Writer(folder / f"{MODEL}.{method}{rate}{recording.SUFFIX}", header) as writer:
        writer.append(np.stack(digests), y.numpy(), *found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_records", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
