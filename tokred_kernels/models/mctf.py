"""What the consistency loss of MCTF needs: one batch, two schedules."""

import dataclasses

from torch import Tensor, nn

from .. import methods, schedule


def two_passes(
    model: nn.Module, images: Tensor, *, r: schedule.Removal | float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(logits [B, classes], class token [B, C] behind the final norm) of the model, and of it with another r.

    Both passes carry gradients. The published training draws r anew for each batch, from 0 to 7, or of a fraction from
    0 to 0.07 in steps of 0.01, so that the second pass fuses little.

    Args:
        model: patched with "mctf", with a class token.
        images: [B, 3, H, W].
        r: of the second pass, as the method's option; 0 fuses nothing.

    Raises:
        ValueError: the model is of another method or has no class token; r is malformed.

    Source: Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention", CVPR 2024.
    """
    method = getattr(model, "tokred_method", None)
    if not isinstance(method, methods.MCTF):
        raise ValueError('two_passes: the model is not patched with "mctf"')
    if not model.has_class_token:
        raise ValueError("two_passes: the model has no class token to compare")
    other = dataclasses.replace(method, r=r)
    other.check(model)
    return _pass(model, images, method), _pass(model, images, other)


def _pass(model: nn.Module, images: Tensor, method: methods.Method) -> tuple[Tensor, Tensor]:
    x, size = model._embed(images), None
    for block, r in zip(model.blocks, model._schedule(x, method), strict=True):
        x, size = model._run(block, x, size, r)
    x = model.norm(x)
    return model.forward_head(x, size=size), x[:, 0]
