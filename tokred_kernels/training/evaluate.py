"""Exact evaluation: every image is counted once, on however many processes."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .. import trace
from . import data
from .distributed import World
from .settings import BadInput
from .watch import Watch


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: data.Images,
    world: World,
    *,
    batch_size: int,
    workers: int = 0,
    amp: bool = False,
    strict: bool = False,
    watch: Watch | None = None,
    predict: Callable[[Tensor], Tensor] | None = None,
    count_tokens: bool = False,
) -> dict:
    """top1 and top5 in percent, or mAP where images have several labels, and how many images these are of.

    Process n takes the images n, n + size, ...; counts are integers, summed over the processes.

    Args:
        batch_size: images a forward.
        strict: refuse an unreadable image instead of naming, skipping and counting it.
        predict: images to logits, instead of the model: what wraps it and runs on all processes at once.
        count_tokens: adds `tokens`, those that enter the first block and leave each, the mean over the images.

    Raises:
        BadInput: an unreadable image where strict; no readable one at all.
    """
    watch = watch or Watch()
    training = model.training
    model.eval()
    rounds = math.ceil(math.ceil(len(images) / world.size) / batch_size)
    loader = data.loader(images, batch_size, range(world.rank, len(images), world.size), workers, drop_last=False)
    batches = iter(loader)
    watch.begin("evaluating", rounds)
    counts = torch.zeros(4, dtype=torch.int64)  # seen, skipped, in the first, in the first five
    tokens, scores, labels = 0, [], []
    for _ in range(rounds):
        pixels, target, unreadable = next(batches, (None, None, []))
        counts[1] += watch.unreadable(unreadable, strict, world.rank)
        if pixels is None:
            if predict is not None:  # the others wait for this process
                predict(torch.zeros(1, 3, *model.patch_embed.img_size, device=world.device))
            continue
        pixels = pixels.to(world.device, non_blocking=True)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
            if count_tokens:
                with trace(model) as traced:
                    logits = model(pixels)
                tokens = tokens + traced.counts.double().sum(0).cpu()
            else:
                logits = (predict or model)(pixels)
        logits = logits.float().cpu()
        counts[0] += len(target)
        if images.split.multi_label:
            scores.append(logits.sigmoid())
            labels.append(target > 0.5)
        else:
            best = logits.topk(min(5, logits.shape[1]), 1).indices == target[:, None]
            counts[2] += best[:, 0].sum()
            counts[3] += best.any(1).sum()
        watch.advance()
    model.train(training)
    seen, skipped, first, five = world.total(counts).tolist()
    if not seen:
        raise BadInput("evaluation: no image could be read")
    result: dict = {"images": seen, "skipped": skipped}
    if images.split.multi_label:
        found = world.gather((torch.cat(scores).numpy(), torch.cat(labels).numpy()) if scores else None)
        found = [part for part in found if part is not None]
        result["mAP"] = mean_average_precision(*(np.concatenate(part) for part in zip(*found, strict=True)))
    else:
        result |= {"top1": 100 * first / seen, "top5": 100 * five / seen}
    if count_tokens:
        total = sum(part for part in world.gather(tokens) if isinstance(part, Tensor))
        result["tokens"] = (total / seen).tolist()
    return result


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """In percent, the mean over the classes that any image has; scores and labels [images, classes]."""
    from sklearn.metrics import average_precision_score

    present = labels.any(0)
    if not present.any():
        raise BadInput("evaluation: no image has a label")
    return 100 * float(average_precision_score(labels[:, present], scores[:, present], average="macro"))
