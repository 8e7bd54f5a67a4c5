"""PatchMerger: learned queries attend to the patches and replace them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._learned import Soft, over_patches


@dataclass(frozen=True)
class PatchMerger(Soft):
    """Learned queries in place of patches; it needs training.

    Before each stage, the P patches become M clusters, one a query q_c, weighted averages of the normalised patches:

        z = LayerNorm(x),   W_ci = softmax_i(scale q_c . z_i),   y_c = sum_i W_ci z_i

    with scale 1 as published. assign names the cluster with the largest weight, the lowest of equals.
    State: blocks.{l}.tokred_part.norm.{weight, bias} and .queries [M, C], which starts as N(0, 1); published
    checkpoints call the part of stage i cluster_layers.{i}.
    Source: Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022, as in Haurum et al., "Which Tokens
    to Use?", ICCVW 2023.

    Options: those of `tokred_kernels.methods.Staged`, which fix M when the model is patched, see `Soft`, and
        scaled_attention: scale C^-1/2 instead of 1.

    Raises:
        ValueError: an option is malformed; the model has no such block.
    """

    scaled_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scaled_attention, bool):
            self._refuse("scaled_attention must be True or False", self.scaled_attention)

    def weighting(self, width: int, clusters: int) -> nn.Module:
        return Queries(width, clusters, width**-0.5 if self.scaled_attention else 1.0)


class Queries(nn.Module):
    def __init__(self, width: int, clusters: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(clusters, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, P, C] to clusters [B, M, C] and W [B, M, P]."""
        z = self.norm(x)
        W = over_patches(self.queries @ z.mT * self.scale)
        return W.to(z.dtype) @ z, W
