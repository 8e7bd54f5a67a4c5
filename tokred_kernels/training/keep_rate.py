"""EViT's warm-up: training starts with all patches and comes down to the keep rate.

for step, (images, target) in enumerate(loader):
    set_keep_rate(model, warm_up(step, 0.7, begin=10 * len(loader), steps=100 * len(loader)))
    criterion(model(images), target).backward()
"""

import dataclasses
import math

from torch import nn


def warm_up(step: int, keep_rate: float, *, begin: int, steps: int) -> float:
    """The keep rate k of a step: 1 before `begin`, then for t = step - begin in `steps` steps

        keep_rate + (1 - keep_rate) (cos(pi t / steps) + 1) / 2

    and keep_rate from there on.

    Source: Liang et al., "EViT", ICLR 2022: begin at epoch 10, for 100 epochs.
    """
    t = step - begin
    if t < 0:
        return 1.0
    if t >= steps:
        return keep_rate
    return keep_rate + (1 - keep_rate) * (math.cos(math.pi * t / steps) + 1) / 2


def set_keep_rate(model: nn.Module, keep_rate: float) -> None:
    """Changes the keep rate of a patched model, between two of its forwards.

    Raises:
        ValueError: the model is not patched, its method has no keep rate, or has learned or constant parts that were
            made for one; a keep rate outside (0, 1]. Nothing was changed.
    """
    method = getattr(model, "tokred_method", None)
    if getattr(method, "keep_rate", None) is None or any(block.tokred_part is not None for block in model.blocks):
        raise ValueError("set_keep_rate: the model must be patched, with a keep rate that no weights depend on")
    other = dataclasses.replace(method, keep_rate=keep_rate)
    other.check(model)
    for module in (model, *model.blocks):
        module.tokred_method = other
