"""What a step of training computes, as one module: the right loss for a method, and the logits beside it."""

import itertools

import torch
from torch import Tensor, nn

from .. import methods
from ..models.dynamicvit import policy_logits
from ..models.mctf import two_passes
from ..models.metr import exit_logits
from . import losses
from .settings import Settings


class Objective(nn.Module):
    """(loss, logits) = objective(images, target), for DDP or FSDP2 and torch.compile to wrap; without target: logits.

    The loss is that of METR for a model with exits, of DynamicViT for one with its predictors, of MCTF in two passes
    where `again` is given, r of the second; else it is the criterion of the logits.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, settings: Settings, teacher: nn.Module | None = None):
        super().__init__()
        self.model, self.criterion, self.settings, self.teacher = model, criterion, settings, teacher
        self.rates = keep_shares(model) if teacher is not None else []

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self, images: Tensor, target: Tensor | None = None, again: int | float | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        say = self.settings
        if target is None:
            return self.model(images)
        if hasattr(self.model, "tokred_exits"):
            output = exit_logits(self.model, images, exit_at=say.exit_at)
            weights = {"exit_weight": say.exit_weight, "distill_weight": say.distill_weight, "tau": say.tau}
            return losses.multi_exit(self.criterion, output, target, **weights), output[0]
        if again is not None:
            output = two_passes(self.model, images, r=again)
            return losses.consistency(self.criterion, output, target, weight=say.consistency), output[0][0]
        if self.teacher is not None:
            output = policy_logits(self.model, images)
            known = losses.teacher(self.teacher, images)
            loss = losses.policy(self.criterion, output, target, known, self.rates, ratio_weight=say.ratio_weight)
            return loss, output[0]
        logits = self.model(images)
        return self.criterion(logits, target), logits


def keep_shares(model: nn.Module) -> list[float]:
    """The share of all patches that each stage of a patched model keeps, by its schedule."""
    patches = model.patch_embed.num_patches
    removed = model.tokred_method.schedule(len(model.blocks), patches)
    return [(patches - gone) / patches for r, gone in zip(removed, itertools.accumulate(removed), strict=True) if r]


def draw_again(model: nn.Module, settings: Settings) -> int | float | None:
    """r of MCTF's second pass for a step, as published: 0 to 7, or a fraction of 0 to 0.07, from torch's generator."""
    method = getattr(model, "tokred_method", None)
    if not isinstance(method, methods.MCTF) or not settings.consistency:
        return None
    drawn = int(torch.randint(8, ()))
    fraction = isinstance(method.r, float)
    return drawn / 100 if fraction and drawn else drawn
