"""Slow float64 forms of the methods that reduce whole tokens, written from their definitions, one image at a time."""

import copy
import math

import torch
import vits
from torch import Tensor, nn
from torch.nn import functional as F

import tokred_kernels as tokred


def run(patched: nn.Module, x: Tensor, reduce) -> tuple[Tensor, Tensor]:
    """The logits [B, classes] and source [B, N0] of a patched model's weights in plain blocks, reduced before some.

    Args:
        reduce: (block index, part, patches [P, C], matrix) to (new patches [M, C], row of each patch [P], -1: dropped),
            or None to leave them alone. matrix [H, N, N] is the attention of the block before, None before the first.
    """
    parts = [block.tokred_part for block in copy.deepcopy(patched).double().blocks]
    model = tokred.remove(copy.deepcopy(patched)).double().eval()
    p = model.num_prefix_tokens
    rows, sources = [], []
    for one in model.norm_pre(model._pos_embed(model.patch_embed(x.double()))):
        source, matrix = torch.arange(len(one)), None
        for index, (block, part) in enumerate(zip(model.blocks, parts, strict=True)):
            result = reduce(index, part, one[p:], matrix)
            if result is not None:
                one = torch.cat([one[:p], result[0]])
                moved = torch.cat([torch.arange(p), torch.where(result[1] < 0, -1, result[1] + p)])
                source = torch.where(source < 0, -1, moved[source])
            y, _, matrix = vits._attention(block, one, torch.ones(len(one), dtype=torch.float64))
            one = one + y
            one = one + block.ls2(block.mlp(block.norm2(one)))
        rows.append(one)
        sources.append(source)
    return model.forward_head(model.norm(torch.stack(rows))), torch.stack(sources)


def averages(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """logits [M, P]: a softmax over the patches for each cluster, and the weighted averages of x [P, C]."""
    W = torch.empty_like(logits)
    for c, row in enumerate(logits):
        weight = [math.exp(value - max(row.tolist())) for value in row.tolist()]
        W[c] = torch.tensor([w / sum(weight) for w in weight], dtype=W.dtype)
    return torch.stack([sum(w * token for w, token in zip(row, x, strict=True)) for row in W]), W


def sit(part: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    norm, first, _, second = part.weight
    logits = []
    for token in x:
        hidden = F.gelu(first.weight @ _layer_norm(norm, token) + first.bias)
        logits.append(part.scale.item() * (second.weight @ hidden + second.bias))
    return averages(torch.stack(logits, 1).detach(), x)


def patchmerger(part: nn.Module, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    z = torch.stack([_layer_norm(part.norm, token) for token in x])
    return averages(torch.stack([scale * (z * query).sum(1) for query in part.queries]).detach(), z)


def sinkhorn(part: nn.Module, x: Tensor, eps: float = 1.0, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """As published: potentials u and v of a transport in logarithms, with marginals 1 / (M + P)."""
    z = torch.stack([token / max(token.norm().item(), 1e-6) for token in x])
    centres = torch.stack([v / max(v.norm().item(), 1e-6) for v in part.v]).detach()
    M, P = len(centres), len(z)
    logits = torch.tensor([[(c @ t).item() / eps for t in z] for c in centres], dtype=x.dtype)
    marginal = -math.log(M + P)
    u, v = torch.zeros(M, dtype=x.dtype), torch.zeros(P, dtype=x.dtype)
    for _ in range(iterations):
        u = marginal - (logits + v).logsumexp(1)
        v = marginal - (logits + u[:, None]).logsumexp(0)
    W = (logits + u[:, None] + v - marginal).exp()
    return torch.stack([(row[:, None] * z).sum(0) for row in W]), W


def _layer_norm(norm: nn.LayerNorm, token: Tensor) -> Tensor:
    centred = token - token.mean()
    return norm.weight * centred / (centred.square().mean() + norm.eps).sqrt() + norm.bias
