"""DynamicViT: a small network in each stage predicts which patches to keep."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._learned import initialised
from ._staged import BeforeBlock

EPS = 1e-6


@dataclass(frozen=True)
class DynamicViT(BeforeBlock):
    """Learned selection of patches; it needs training.

    Before each stage, a predictor gives every patch the log probability of being kept, with m = 1 for the patches that
    are still there:

        h = GELU(Linear(LayerNorm(x)))   [P, C];   z = [h_:C/2, sum_P m h_C/2: / (sum_P m + 1e-6)]
        log p = log softmax(Linear(GELU(Linear(GELU(Linear(z))))))   of widths C/2, C/4, 2: keep, drop

    In eval mode the patches with the highest log p(keep) stay, in their order, and the others are dropped.

    In training no patch is removed. Each stage draws keep or drop from p by a Gumbel softmax at temperature 1, hard
    with the gradient of the soft one, and what was dropped stays dropped: m <- keep m. m is the `size` that travels
    from block to block. From the first stage on, attention leaves out the dropped patches, but for themselves:

        e_ij = exp(s_ij - max_j s_ij) (1 if i = j else m_j),   p_ij = (e_ij + 1e-6 / N) / (sum_j e_ij + 1e-6)

    with s = q k^T D^-1/2, in float32. Average, maximum and attention pooling leave them out too; `policy_logits` gives
    what the loss needs. assign is -1 where m = 0.

    Differences from the published codes: one adds 1e-6 to the mean in z instead of its denominator; one keeps patches
    in the order of their scores; with m = 1 everywhere both use the formula above, here it is plain attention.
    State: blocks.{l}.tokred_part.{in_conv.0, in_conv.1, out_conv.0, out_conv.2, out_conv.4}.{weight, bias}; published
    checkpoints call the part of stage i score_predictor.{i}.
    Source: Rao et al., "DynamicViT", NeurIPS 2021, as in Haurum et al., "Which Tokens to Use?", ICCVW 2023.

    Options: those of `tokred_kernels.methods.Staged`. In training they only name the stages; the loss sees to the rate.

    Raises:
        ValueError: an option is malformed; the model has no such block.
    """

    masks: ClassVar[bool] = True
    trains_size: ClassVar[bool] = True

    def part(self, model: nn.Module, block: int) -> nn.Module | None:
        return initialised(Predictor(model.embed_dim)) if self.may_reduce(block) else None

    def reduce(self, block, x: Tensor, size: Tensor | None, keep: int) -> tuple[Tensor, Tensor | None, Tensor]:
        prefix = block.tokred_prefix
        score = F.pad(block.tokred_part(x[:, prefix:]), (prefix, 0))
        x, assign = torch.ops.tokred.topk_gather(x, score, keep, prefix)
        return x, size, assign

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not block.training:
            return super().step(block, x, size, r)
        assign = None
        if r != 0:
            size = self.draw(block, x, size)
            index = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
            assign = torch.where(size > 0, index, -1)
        q, k, v = block.project(x)
        if size is None:
            x = x + block.attend(q, k, v)[0]
        else:
            x = x + block.branch(block.attn.attn_drop(policy_matrix(q, k, size).to(v.dtype)) @ v)
        return x + block.feed_forward(x), size, assign

    def draw(self, block, x: Tensor, size: Tensor | None) -> Tensor:
        """The policy [B, N] after this stage: 1 for the prefix and for patches that are kept, 0 for the others."""
        prefix = block.tokred_prefix
        mask = None if size is None else size[:, prefix:]
        score = block.tokred_part(x[:, prefix:], mask)
        noise = torch.empty(*score.shape, 2, dtype=score.dtype, device=x.device).exponential_().log()
        # With two classes, log p + Gumbel noise (minus noise) of keep against that of drop.
        soft = score + noise[..., 1] - noise[..., 0]
        hard, soft = (soft >= 0).to(soft.dtype), soft.sigmoid()
        keep = hard + (soft - soft.detach())  # exactly 0 or 1
        return F.pad(keep if mask is None else keep * mask, (prefix, 0), value=1.0)


class Predictor(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """log p(keep) - log p(drop) of x [B, P, C] with mask [B, P]: [B, P] in float32.

        It orders patches as log p(keep) does, and does not saturate.
        """
        h = self.in_conv(x)
        half = x.shape[2] // 2
        wide = torch.promote_types(x.dtype, torch.float32)
        if mask is None:
            total, count = h[..., half:].sum(1, keepdim=True, dtype=wide), x.shape[1]
        else:
            total = (h[..., half:] * mask[..., None]).sum(1, keepdim=True, dtype=wide)
            count = mask.sum(1)[:, None, None]
        mean = (total / (count + EPS)).to(h.dtype)
        # The first layer of [h, mean]: mean is the same for all patches, and so is its product.
        first = self.out_conv[0]
        z = F.linear(h[..., :half], first.weight[:, :half], first.bias) + F.linear(mean, first.weight[:, half:])
        keep, drop = self.out_conv[1:](z).to(wide).unbind(2)
        return keep - drop


def policy_matrix(q: Tensor, k: Tensor, size: Tensor) -> Tensor:
    """The attention matrix p [B, H, N, N] of training, in float32, for the policy [B, N]."""
    N = q.shape[2]
    logits = q * q.shape[3] ** -0.5 @ k.mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = torch.eye(N, dtype=torch.bool, device=q.device)
    e = (logits - logits.amax(3, keepdim=True)).exp() * torch.where(own, 1, size[:, None, None])
    return (e + EPS / N) / (e.sum(3, keepdim=True) + EPS)
