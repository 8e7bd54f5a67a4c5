"""One forward of a patched model, and what a record holds of it."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..trace import trace
from .pattern import patterns


class Observed(NamedTuple):
    """Of B images: top1 [B] int32, the largest logit; pattern [B, S, P] int16; feature [B, F, C] float32."""

    top1: np.ndarray
    pattern: np.ndarray
    feature: np.ndarray


def observe(model: nn.Module, pixels: Tensor, blocks: Sequence[int], feature_blocks: Sequence[int]) -> Observed:
    """Runs a model on pixels [B, 3, H, W] and keeps its answers, patterns and class tokens.

    Args:
        model: patched by `tokred_kernels.apply`, run eagerly; with a class token, unless there are no feature_blocks.
        blocks: those after which to keep the pattern; feature_blocks: those after which to keep the class token.
    """
    found: dict[int, Tensor] = {}

    def keep(block: int, _module: nn.Module, _args: tuple, output: tuple) -> None:
        found[block] = output[0][:, 0].float()

    with torch.inference_mode(), trace(model) as traced:
        handles = [model.blocks[block].register_forward_hook(partial(keep, block)) for block in feature_blocks]
        try:
            logits = model(pixels)
        finally:
            for handle in handles:
                handle.remove()
        none = pixels.new_empty(len(pixels), 0, model.embed_dim)
        feature = torch.stack([found[block] for block in feature_blocks], 1) if feature_blocks else none
        top1 = logits.argmax(1).int().cpu().numpy()
        return Observed(top1, patterns(traced.last, model.num_prefix_tokens, blocks), feature.cpu().numpy())
