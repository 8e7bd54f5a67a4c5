"""METR: EViT in a model that was trained with exits, which make the class token's attention a better score."""

from dataclasses import dataclass

from .evit import EViT


@dataclass(frozen=True)
class METR(EViT):
    """Multi-exit token reduction at inference: EViT, on weights of multi-exit training.

    The exits act in training only; `tokred_kernels.load_metr` puts such weights into a timm model, with or without
    the exits. With DiffRate's schedules, `tokens` names the patches each block keeps, for DeiT-S at 2.3 G MACs
    [196, 179, 155, 126, 108, 97, 79, 65, 51, 36, 30, 2].
    Source: Liu et al., "A Simple Romance Between Multi-Exit Vision Transformer and Token Reduction", ICLR 2024.

    Options: those of `tokred_kernels.methods.evit.EViT`.
    """
