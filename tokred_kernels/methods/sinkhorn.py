"""Sinkhorn: patches are shared out among learned centres by optimal transport."""

import numbers
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._learned import Soft


@dataclass(frozen=True)
class Sinkhorn(Soft):
    """Clusters by optimal transport between patches and learned centres; it needs training.

    Before each stage, the P patches become M clusters, weighted sums (not averages) of unit patches:

        z_i = x_i / max(|x_i|, 1e-6),   c = v_c / max(|v_c|, 1e-6),   W_ci = exp(c . z_i / eps)
        iterations times:   W_ci /= sum_i W_ci,   then   W_ci /= sum_c W_ci
        y_c = sum_i W_ci z_i

    so that every patch is shared out completely and every cluster gets about P / M of them. The published code takes
    the same steps on logarithms. It also writes the normalised centres back into v in every forward; here they are
    normalised where they are used, and nothing is written. assign names the cluster with the largest weight, the
    lowest of equals.
    State: blocks.{l}.tokred_part.v [M, C], which starts as N(0, 1); published checkpoints call the part of stage i
    cluster_layers.{i}.
    Source: Haurum et al., "Which Tokens to Use?", ICCVW 2023; Cuturi, "Sinkhorn Distances", NeurIPS 2013.

    Options: those of `tokred_kernels.methods.Staged`, which fix M when the model is patched, see `Soft`, and
        eps: the temperature, at least 0.025, so that exp(2 / eps) fits in float32.
        iterations: at least 1.

    Raises:
        ValueError: an option is malformed; the model has no such block.
    """

    eps: float = 1.0
    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eps, bool) or not isinstance(self.eps, numbers.Real) or not 0.025 <= self.eps < float("inf"):
            self._refuse("eps must be a number of at least 0.025", self.eps)
        self._integer("iterations", self.iterations, 1)

    def weighting(self, width: int, clusters: int) -> nn.Module:
        return Transport(width, clusters, float(self.eps), int(self.iterations))


class Transport(nn.Module):
    def __init__(self, width: int, clusters: int, eps: float, iterations: int) -> None:
        super().__init__()
        self.eps, self.iterations = eps, iterations
        self.v = nn.Parameter(torch.randn(clusters, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, P, C] to clusters [B, M, C] and W [B, M, P]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        z = F.normalize(x.to(wide), dim=2, eps=1e-6)
        centres = F.normalize(self.v.to(wide), dim=1, eps=1e-6)
        W = (centres @ z.mT / self.eps).to(wide).softmax(2)  # exp, and the first of the divisions
        for iteration in range(self.iterations):
            if iteration > 0:
                W = W / W.sum(2, keepdim=True)
            W = W / W.sum(1, keepdim=True)
        return W @ z, W
