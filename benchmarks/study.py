"""What training does for token reduction, on real data that ships with a package: scikit-learn's 1,797 digits.

    python -m benchmarks.study                       train, write docs/study.md, docs/study.png and docs/study.json
    python -m benchmarks.study --show                write the page and the plot again from docs/study.json

A small ViT (6 blocks of width 48, the digits enlarged to 12 x 12 pixels, 36 patches of 2 x 2) learns from scratch, once
as it is and once with METR's exits; both are evaluated with EViT at every keep rate, then fine-tuned at it. From the
first model also MCTF is fine-tuned with and without its consistency loss, and Top-K, radial rings and soft merging at
every keep rate. Each seed has a split of its own, 1,437 to train and 360 to test. What comes out is written down.
"""

import argparse
import copy
import json
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokred_kernels as tokred
from tokred_kernels import training

DOCS = Path(__file__).resolve().parent.parent / "docs"
SEEDS, WORKERS = 5, 2
EPOCHS, TUNING = 15, 3  # from scratch, and each fine-tuning
BATCH, RATE, TUNING_RATE = 32, 2e-3, 2e-4
KEEP = (0.7, 0.5, 0.3)
STAGES = (1, 3)  # of 6 blocks
R = 4  # of MCTF in blocks 1 to 5: 37 tokens become 17
SELECTION = ("topk", "radial", "sit", "patchmerger", "sinkhorn")
SHAPE = dict(img_size=12, patch_size=2, in_chans=1, embed_dim=48, depth=6, num_heads=3, num_classes=10)


def seed_figures(seed: int) -> dict[str, float]:
    """The test accuracies of one seed, in percent, by "what keep"."""
    torch.set_num_threads(1)
    x, y, test_x, test_y = _digits(seed)

    def accuracy(model: nn.Module) -> float:
        with torch.inference_mode():
            return 100 * (model.eval()(test_x).argmax(1) == test_y).double().mean().item()

    def tune(model: nn.Module, loss=None) -> float:
        _train(model, x, y, loss or _plain, TUNING, TUNING_RATE, seed)
        return accuracy(model)

    torch.manual_seed(seed)
    start = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    nn.init.normal_(start.pos_embed, std=0.5)  # timm's 0.02 takes many epochs to tell places apart
    found = {}
    bases = {"dense": copy.deepcopy(start), "exits": tokred.add_exits(copy.deepcopy(start), STAGES)}
    _train(bases["dense"], x, y, _plain, EPOCHS, RATE, seed)
    _train(bases["exits"], x, y, _multi_exit, EPOCHS, RATE, seed)
    for name, base in bases.items():
        found[f"{name} 1"] = accuracy(base)
        for keep in KEEP:
            model = tokred.apply(copy.deepcopy(base), "evit", keep_rate=keep, stages=STAGES)
            found[f"{name} {keep}"] = accuracy(model)
            found[f"{name} tuned {keep}"] = tune(model, _multi_exit if name == "exits" else None)
    for name, loss in (("mctf", None), ("mctf consistent", _consistent)):
        model = tokred.apply(copy.deepcopy(bases["dense"]), "mctf", r=R)
        found["mctf untuned"] = accuracy(model)
        found[name] = tune(model, loss)
    for method in SELECTION:
        for keep in KEEP:
            torch.manual_seed(seed)
            model = tokred.apply(copy.deepcopy(bases["dense"]), method, keep_rate=keep, stages=STAGES)
            found[f"{method} {keep}"] = tune(model)
    return found


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.2, random_state=seed, stratify=labels)
    train, test = (torch.from_numpy(part).float().view(-1, 1, 8, 8) / 8 - 1 for part in parts[:2])
    train, test = (F.interpolate(images, (12, 12), mode="bilinear", antialias=True) for images in (train, test))
    return train, torch.from_numpy(parts[2]), test, torch.from_numpy(parts[3])


_CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1)


def _plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return _CRITERION(model(x), y)


def _multi_exit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return training.multi_exit(_CRITERION, tokred.exit_logits(model, x), y)


def _consistent(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    r = int(torch.randint(R // 2, ()))
    return training.consistency(_CRITERION, tokred.two_passes(model, x, r=r), y)


def _train(model: nn.Module, x: Tensor, y: Tensor, loss, epochs: int, rate: float, seed: int) -> None:
    """AdamW and a cosine, over digits moved by up to one pixel."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps / 20), (1 + math.cos(math.pi * step / steps)) / 2)
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            row, column = torch.randint(3, (2,)).tolist()
            moved = F.pad(x[batch], (1, 1, 1, 1), value=-1)[:, :, row : row + 12, column : column + 12]
            optimizer.zero_grad()
            loss(model, moved, y[batch]).backward()
            optimizer.step()
            schedule.step()


def measure() -> list[dict[str, float]]:
    """The figures of every seed, on two processes, with a progress bar."""
    from rich.progress import track

    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        jobs = [pool.submit(seed_figures, seed) for seed in range(SEEDS)]
        for _ in track(as_completed(jobs), "seeds", total=SEEDS):
            pass
        return [job.result() for job in jobs]


def _cell(figures: list[dict[str, float]], key: str) -> str:
    values = np.array([seed[key] for seed in figures])
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def page(figures: list[dict[str, float]]) -> str:
    """docs/study.md."""
    rows = {
        "trained as it is": ("dense", "dense tuned"),
        "trained with exits": ("exits", "exits tuned"),
    }
    text = [
        "# What training does for token reduction",
        "",
        "Made by `make study`, never by hand: test accuracy in percent, mean and standard deviation of "
        f"{len(figures)} seeds. A ViT of 6",
        "blocks of width 48 and 36 patches, trained from scratch on the CPU on scikit-learn's digits; "
        "`benchmarks/study.py` has",
        "the rest. One test image is 0.3 points; deviations are those of single seeds. A small model on small images",
        "shows what the losses do there, not what ImageNet would give.",
        "",
        f"EViT in blocks {' and '.join(map(str, STAGES))}, without and with multi-exit training, before and after "
        "fine-tuning at that rate:",
        "",
        "| | keep 1 | "
        + " | ".join(f"keep {k}" for k in KEEP)
        + " | "
        + " | ".join(f"tuned, {k}" for k in KEEP)
        + " |",
        "|---" * (2 + 2 * len(KEEP)) + "|",
    ]
    for name, (plain, tuned) in rows.items():
        cells = [_cell(figures, f"{plain} 1"), *(_cell(figures, f"{plain} {k}") for k in KEEP)]
        cells += [_cell(figures, f"{tuned} {k}") for k in KEEP]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    text += [
        "",
        f"MCTF with r = {R} in blocks 1 to 5, from the first model:",
        "",
        "| not tuned | tuned | tuned with consistency |",
        "|---|---|---|",
        f"| {_cell(figures, 'mctf untuned')} | {_cell(figures, 'mctf')} | {_cell(figures, 'mctf consistent')} |",
        "",
        "Selection, radial rings and soft merging from the first model, fine-tuned at each keep rate "
        "(k of the patches, then k²):",
        "",
        "| | " + " | ".join(f"keep {k}" for k in KEEP) + " |",
        "|---" * (1 + len(KEEP)) + "|",
        *(f"| {m} | " + " | ".join(_cell(figures, f"{m} {k}") for k in KEEP) + " |" for m in SELECTION),
        "",
        "![Accuracy against keep rate](study.png)",
    ]
    return "\n".join(text) + "\n"


def plot(figures: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    lines = {
        "as it is": [("dense 1", 1.0), *((f"dense {k}", k) for k in KEEP)],
        "with exits": [("exits 1", 1.0), *((f"exits {k}", k) for k in KEEP)],
        "as it is, tuned": [(f"dense tuned {k}", k) for k in KEEP],
        "with exits, tuned": [(f"exits tuned {k}", k) for k in KEEP],
    }
    soft = {method: [(f"{method} {k}", k) for k in KEEP] for method in SELECTION}
    for axis, drawn, title in ((axes[0], lines, "EViT, multi-exit training"), (axes[1], soft, "methods, fine-tuned")):
        for name, points in drawn.items():
            values = np.array([[seed[key] for key, _ in points] for seed in figures])
            axis.errorbar(
                [k for _, k in points], values.mean(0), values.std(0, ddof=1), label=name, marker="o", capsize=3
            )
        axis.set(title=title, xlabel="keep rate", xticks=sorted({k for points in drawn.values() for _, k in points}))
        axis.legend(ncols=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"test accuracy, %, of {len(figures)} seeds")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="from docs/study.json, without training")
    saved = DOCS / "study.json"
    if not parser.parse_args(argv).show:
        saved.write_text(json.dumps(measure(), indent=1) + "\n")
    figures = json.loads(saved.read_text())
    (DOCS / "study.md").write_text(page(figures))
    plot(figures, DOCS / "study.png")
    print(page(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
