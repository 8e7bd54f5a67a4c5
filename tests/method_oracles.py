"""Slow float64 forms of the methods that reduce whole tokens, written from their definitions, one image at a time."""

import copy
import itertools
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


def distances(x: Tensor) -> list[list[float]]:
    return [[math.sqrt(sum((a - b) ** 2 for a, b in zip(u, v, strict=True))) for v in x.tolist()] for u in x.tolist()]


class Choices:
    """Picks the lowest of some values, of equals the first, and notes whether a choice was ever closer than rounding.

    Exact ties are clear: what is equal by definition is equal in floating point, in any precision.
    """

    def __init__(self, rounding: float = 1e-12) -> None:
        self.rounding, self.clear = rounding, True

    def lowest(self, values: list[float], k: int = 1) -> list[int]:
        order = sorted(range(len(values)), key=lambda i: (values[i], i))
        scale = max(abs(v) for v in values)
        for i, j in itertools.pairwise(order[: k + 1]):
            gap = values[j] - values[i]
            self.clear = self.clear and (gap == 0 or gap > self.rounding * scale)
        return order[:k]


def dpcknn(x: Tensor, k: int, part: nn.Module | None = None, neighbors: int = 5, choices: Choices | None = None):
    """(rows [k, C], label [P])."""
    choices = choices or Choices()
    P, C = x.shape
    d = [[value / math.sqrt(C) for value in row] for row in distances(x)]
    rho = []
    for row in d:
        near = sorted(row)[:neighbors]
        rho.append(math.exp(-sum(value * value for value in near) / len(near)))
    score = []
    for i in range(P):
        denser = [j for j in range(P) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        score.append(rho[i] * (min(d[i][j] for j in denser) if denser else max(map(max, d))))
    centres = choices.lowest([-value for value in score], k)
    label = [centres.index(i) if i in centres else choices.lowest([d[i][c] for c in centres])[0] for i in range(P)]
    weight = [1.0] * P if part is None else [math.exp(part["score"](token).item()) for token in x]
    rows = []
    for c in range(k):
        members = [i for i in range(P) if label[i] == c]
        rows.append(sum(weight[i] * x[i] for i in members) / sum(weight[i] for i in members))
    return torch.stack(rows), torch.tensor(label)


def kmedoids(
    x: Tensor,
    k: int,
    weight: list[float] | None,
    update: str = "textbook",
    iterations: int = 3,
    choices: Choices | None = None,
):
    """(medoids [k], label [P]); weight None: equal weights and the farthest-first start."""
    choices = choices or Choices()
    d = distances(x)
    P = len(d)
    if weight is None:
        weight = [1.0] * P
        centres = choices.lowest([sum(row) for row in d])
        while len(centres) < k:
            rest = [i for i in range(P) if i not in centres]
            centres.append(rest[choices.lowest([-min(d[i][c] for c in centres) for i in rest])[0]])
    else:
        centres = choices.lowest([-w for w in weight], k)

    def labels():
        return [choices.lowest([d[i][c] for c in centres])[0] for i in range(P)]

    for _ in range(iterations):
        label = labels()
        for c in range(k):
            members = [i for i in range(P) if label[i] == c]
            if not members:
                continue
            if update == "textbook":
                cost = [sum(weight[j] * d[i][j] for j in members) for i in members]
            else:
                cost = [weight[i] * sum(d[i]) for i in members]
            centres[c] = members[choices.lowest(cost)[0]]
    return torch.tensor(centres), torch.tensor(labels())


def predictor(part: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """DynamicViT: log p [P, 2] of keep and drop, for x [P, C] with mask [P]."""
    norm, linear, _ = part.in_conv
    half = x.shape[1] // 2
    h = [F.gelu(linear.weight @ _layer_norm(norm, token) + linear.bias) for token in x]
    mean = sum(m * row[half:] for m, row in zip(mask, h, strict=True)) / (mask.sum() + 1e-6)
    rows = []
    for row in h:
        z = torch.cat([row[:half], mean])
        for layer in part.out_conv:
            z = layer.weight @ z + layer.bias if isinstance(layer, nn.Linear) else F.gelu(z)
        rows.append(z.log_softmax(0))
    return torch.stack(rows)


def dynamicvit_training(patched: nn.Module, parts: dict, x: Tensor, noise: dict):
    """DynamicViT in training, differentiable, in the dtype of the unpatched model.

    Args:
        patched: the plain blocks. parts: {block: predictor}. noise: {block: exponential draws [B, P, 2]}.

    Returns:
        logits, {block: keep [B, P]}, patches [B, P, C].
    """
    model, p = patched, patched.num_prefix_tokens
    rows, policies, decisions = [], [], {block: [] for block in parts}
    for n, one in enumerate(model.norm_pre(model._pos_embed(model.patch_embed(x)))):
        keep = torch.ones(len(one) - p, dtype=x.dtype)
        policy = None
        for index, block in enumerate(model.blocks):
            if index in parts:
                soft = (predictor(parts[index], one[p:], keep) - noise[index][n].log()).softmax(1)
                hard = F.one_hot(soft.argmax(1), 2).to(x.dtype)
                keep = (hard + soft - soft.detach())[:, 0] * keep
                decisions[index].append(keep)
                policy = torch.cat([torch.ones(p, dtype=x.dtype), keep])
            one = one + _policy_attention(block, one, policy)
            one = one + block.ls2(block.mlp(block.norm2(one)))
        rows.append(model.norm(one))
        policies.append(policy)
    rows = torch.stack(rows)
    pooled = rows[:, 0]
    if model.global_pool == "avg":
        weight = torch.stack(policies)[:, p:]
        pooled = (rows[:, p:] * weight[..., None]).sum(1) / weight.sum(1)[:, None]
    logits = model.head(model.head_drop(model.fc_norm(pooled)))
    return logits, {block: torch.stack(keep) for block, keep in decisions.items()}, rows[:, p:]


def _policy_attention(block, x: Tensor, policy: Tensor | None) -> Tensor:
    attn, N = block.attn, len(x)
    q, k, v = attn.qkv(block.norm1(x)).view(N, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    heads = []
    for qh, kh, vh in zip(q, k, v, strict=True):
        rows = []
        for i in range(N):
            logits = kh @ qh[i] / math.sqrt(attn.head_dim)
            if policy is None:
                rows.append(logits.softmax(0) @ vh)
                continue
            gate = torch.cat([policy[:i], torch.ones(1, dtype=x.dtype), policy[i + 1 :]])
            e = (logits - logits.max()).exp() * gate
            rows.append((e + 1e-6 / N) / (e.sum() + 1e-6) @ vh)
        heads.append(torch.stack(rows))
    return block.ls1(attn.proj(attn.norm(torch.cat(heads, 1))))
