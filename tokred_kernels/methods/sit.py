"""SiT: clusters whose weights an MLP predicts from each patch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._learned import Soft, over_patches


@dataclass(frozen=True)
class SiT(Soft):
    """Self-slimmed tokens; it needs training.

    Before each stage, the P patches become M clusters, weighted averages of all of them:

        W_ci = softmax_i(scale MLP(x_i)_c),   y_c = sum_i W_ci x_i

    with MLP = LayerNorm, Linear C -> C/2, GELU, Linear C/2 -> M, and a learned scale that starts at 1.
    assign names the cluster with the largest weight, the lowest of equals.
    State: blocks.{l}.tokred_part.{weight.0, weight.1, weight.3}.{weight, bias} and .scale [1, 1, 1]; published
    checkpoints call the part of stage i cluster_layers.{i}.
    Source: Zong et al., "Self-slimmed Vision Transformer" (SiT), ECCV 2022, as in Haurum et al., "Which Tokens to
    Use?", ICCVW 2023.

    Options: those of `tokred_kernels.methods.Staged`. They fix M when the model is patched; see `Soft`.
    """

    def weighting(self, width: int, clusters: int) -> nn.Module:
        return Slimming(width, clusters)


class Slimming(nn.Module):
    def __init__(self, width: int, clusters: int) -> None:
        super().__init__()
        hidden = width // 2
        self.weight = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, clusters)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, P, C] to clusters [B, M, C] and W [B, M, P]."""
        W = over_patches((self.weight(x) * self.scale).mT)
        return W.to(x.dtype) @ x, W
