"""The specification of every op in plain PyTorch: any device, any strides, float32 inside (float64 for float64 inputs).

It is the dispatcher's fallback on devices without a kernel, the oracle's first witness in the tests and a baseline in
the benchmarks. It is never edited to fit a kernel.
"""

import torch
from torch import Tensor

from . import _check
from ._check import wide as _wide
from .reference_clusters import knn, medoids, nearest, pairwise_distance, separation  # noqa: F401 (the rest of it)

_NORM_FLOOR = 1e-6


def match_scores(metric: Tensor, prefix: int, weight: Tensor | None = None, power: float = 1.0) -> Tensor:
    """Edge scores [B, Na, Nb] between the even (a) and the odd (b) positions after the prefix; NaN becomes -inf."""
    if metric.dim() == 4:
        heads = metric.shape[1]
        mean = _wide(metric[:, 0])
        for h in range(1, heads):  # in head order: torch.mean does not fix the order of its sum
            mean = mean + _wide(metric[:, h])
        mean = mean / heads
    else:
        mean = _wide(metric)
    unit = mean * mean.square().sum(-1, keepdim=True).sqrt().clamp(min=_NORM_FLOOR).reciprocal()
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    a, b = unit[:, first_a::2], unit[:, first_b::2]
    # A float32 GEMM rounds equal rows differently at its tile edges; in float64, rounded once, equal rows tie exactly.
    score = (a.double() @ b.double().transpose(1, 2)).to(unit.dtype)
    if weight is not None:
        w = weight.to(unit.dtype)
        score = ((score + 1) / 2).clamp(min=0).pow(power) * w[:, first_a::2, None] * w[:, None, first_b::2]
    return score.masked_fill(score.isnan(), -torch.inf)


def _edges(score: Tensor) -> tuple[Tensor, Tensor]:
    """score [B, rows, columns] -> the best column of every row, and the rank of its score among the rows."""
    best = score.amax(-1)
    # Lowest column of the best score: max's own index is unspecified under ties.
    column = (score == best[..., None]).to(torch.uint8).argmax(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    return column, order.argsort(dim=-1)


def match(
    metric: Tensor,
    r: int,
    prefix: int = 1,
    weight: Tensor | None = None,
    *,
    power: float = 1.0,
    two_way: bool = False,
) -> Tensor:
    _check.match(metric, r, prefix, weight)
    B, N = metric.shape[0], metric.shape[-2]
    r = _check.clamp_r(r, N, prefix)
    assign = torch.arange(N, device=metric.device, dtype=torch.int32).repeat(B, 1)
    if r == 0:
        return assign
    score = match_scores(metric, prefix, weight, power)
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    Na, Nb = score.shape[1:]
    r_a = r // 2 if two_way else r  # of a; the others of b

    into_b, rank = _edges(score)
    gone = rank < r_a
    row_a = prefix + (~gone).cumsum(1) - 1
    first_b_row = prefix + Na - r_a
    row_b = first_b_row + torch.arange(Nb, device=metric.device).repeat(B, 1)
    if two_way:
        kept = gone.byte().sort(dim=1, stable=True).indices[:, : Na - r_a]
        into_a, rank = _edges(score.gather(1, kept[..., None].expand(-1, -1, Nb)).transpose(1, 2))
        r_b = r - r_a
        row_b = torch.where(rank < r_b, prefix + into_a, first_b_row + rank - r_b)
    assign[:, first_a::2] = torch.where(gone, row_b.gather(1, into_b), row_a).int()
    assign[:, first_b::2] = row_b.int()
    return assign


def merge(
    x: Tensor,
    assign: Tensor,
    m: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    _check.merge(x, assign, m, size, weight, reduce)
    B, N, C = x.shape
    wide = _wide(x)
    row = assign.long()
    row = torch.where((row < 0) | (row >= m), m, row)  # dropped tokens collect in row m, cut off at the end
    flat_row = (row + (m + 1) * torch.arange(B, device=x.device)[:, None]).flatten()

    def add_up(value: Tensor) -> Tensor:
        """[B, N, c] summed by row, [B, m, c]; members in index order."""
        total = value.new_zeros(B * (m + 1), value.shape[2])
        value = value.flatten(0, 1)
        if x.is_cuda:  # scatter_add uses atomics there; this sorts
            total.index_put_((flat_row,), value, accumulate=True)
        else:
            total.scatter_add_(0, flat_row[:, None].expand_as(value), value)
        return total.unflatten(0, (B, m + 1))[:, :m]

    ones = wide.new_ones(B, N, 1)
    size_wide = ones if size is None else size.to(wide.dtype)[..., None]
    size_out = add_up(size_wide).squeeze(2)
    count = add_up(ones)

    if reduce == "amax":
        out = wide.new_full((B, m + 1, C), -torch.inf)
        out = out.scatter_reduce(1, row[..., None].expand(-1, -1, C), wide, "amax")[:, :m]
        return out.masked_fill(count == 0, 0).to(x.dtype), size_out

    w = ones if reduce == "sum" else size_wide
    w = w if weight is None else weight.to(wide.dtype)[..., None]
    out = add_up(w * wide)
    if reduce == "mean":
        total = add_up(w)
        out = torch.where(total == 0, add_up(wide) / count.clamp(min=1), out / total)
        # A single member is copied: w * x / w would round.
        index = torch.arange(N, device=x.device).expand(B, -1)
        only = row.new_zeros(B, m + 1).scatter_(1, row, index)[:, :m, None]
        if N > 0:
            out = torch.where(count == 1, wide.gather(1, only.expand(-1, -1, C)), out)
    return out.to(x.dtype), size_out


def add_merge_norm(
    x: Tensor,
    branch: Tensor,
    assign: Tensor,
    m: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    size: Tensor | None = None,
    branch_scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.add_merge_norm(x, branch, assign, m, norm_weight, norm_bias, size, branch_scale, branch_bias)
    out, size_out = merge(residual(x, branch, branch_scale, branch_bias), assign, m, size)
    return out, size_out, _layer_norm(out, norm_weight, norm_bias, eps)


def residual(x: Tensor, branch: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x + scale (branch + bias), rounded once."""
    wide = _wide(branch)
    if bias is not None:
        wide = wide + bias.to(wide.dtype)
    if scale is not None:
        wide = wide * scale.to(wide.dtype)
    return (_wide(x) + wide).to(x.dtype)


def _layer_norm(row: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = _wide(row)
    apart = wide - wide.mean(-1, keepdim=True)
    normed = apart * (apart.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        normed = normed * weight.to(wide.dtype)
    if bias is not None:
        normed = normed + bias.to(wide.dtype)
    return normed.to(row.dtype)


def unmerge(y: Tensor, assign: Tensor) -> Tensor:
    _check.unmerge(y, assign)
    M, C = y.shape[1:]
    row = assign.long()
    kept = ((row >= 0) & (row < M))[..., None]
    padded = torch.cat([y, y.new_zeros(y.shape[0], 1, C)], 1)
    return padded.gather(1, torch.where(kept, row[..., None], M).expand(-1, -1, C))


def match_merge(
    x: Tensor, metric: Tensor, r: int, prefix: int = 1, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check.match_merge(x, metric, r, prefix, size)
    N = x.shape[1]
    assign = match(metric, r, prefix)
    out, size_out = merge(x, assign, N - _check.clamp_r(r, N, prefix), size)
    return out, size_out, assign


def attention_matrix(q: Tensor, k: Tensor, size: Tensor | None, scale: float | None) -> Tensor:
    """Probabilities [B, H, Nq, N]: size_j exp(s_ij) / sum_j size_j exp(s_ij); 0 for masked keys and in rows without
    mass."""
    scale = _check.scale(scale, q.shape[-1])
    keep = None if size is None else (size > 0)[:, None, None]  # NaN > 0 is False
    logits = (_wide(q) * scale) @ _unmasked(k, size).transpose(2, 3)
    if size is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    if logits.shape[3] == 0:
        return logits
    highest = logits.amax(3, keepdim=True)
    mass = (logits - highest.masked_fill(highest == -torch.inf, 0)).exp()
    if size is not None:
        mass = torch.where(keep, mass * size.to(mass.dtype)[:, None, None], 0)
    total = mass.sum(3, keepdim=True)
    p = mass / total.masked_fill(total == 0, 1)
    return p if keep is None else torch.where(keep, p, 0)


def _emitted(p: Tensor, scores: str) -> Tensor:
    """The by-product [B, N] of probabilities [B, H, Nq, N]."""
    B, Nq, N = p.shape[0], p.shape[2], p.shape[3]
    if scores == "none":
        return p.new_empty(B, 0)
    if Nq == 0:
        return p.new_zeros(B, N)
    return p[:, :, 0].mean(1) if scores == "cls" else p.mean((1, 2))


def _per_query(t: Tensor) -> Tensor:
    """The same values, stored [B, N, H, D]."""
    return t.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _unmasked(t: Tensor, size: Tensor | None) -> Tensor:
    """Keys or values [B, H, N, D] with the masked ones 0, so that what they hold is never looked at."""
    return _wide(t) if size is None else torch.where((size > 0)[:, None, :, None], _wide(t), 0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, scale: float | None = None, scores: str = "none"
) -> tuple[Tensor, Tensor]:
    _check.attention("attention", q, k, v, size, scores)
    p = attention_matrix(q, k, size, scale)
    out = p @ _unmasked(v, size)
    return _per_query(out.to(q.dtype)), _emitted(p, scores)


def attention_scores(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, scores: str = "cls"
) -> Tensor:
    _check.attention("attention_scores", q, k, None, size, scores)
    first = q[:, :, :1] if scores == "cls" else q  # the other rows of the matrix are not looked at
    return _emitted(attention_matrix(first, k, size, scale), scores)


def attention_backward(
    grad_out: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    scores: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    _check.attention_backward(grad_out, grad_scores, q, k, v, out, size, scores)
    H, Nq = q.shape[1:3]
    p = attention_matrix(q, k, size, scale)
    scale = _check.scale(scale, q.shape[3])
    k_wide, v_wide = _unmasked(k, size), _unmasked(v, size)
    grad_p = torch.zeros_like(p)
    grad_v = torch.zeros_like(v_wide)
    if grad_out is not None:
        grad_out = _wide(grad_out)
        grad_p = grad_p + grad_out @ v_wide.transpose(2, 3)
        grad_v = p.transpose(2, 3) @ grad_out
    if grad_scores is not None and scores != "none" and Nq > 0:
        emitted = grad_scores.to(p.dtype)[:, None, None] / H
        if scores == "cls":
            grad_p[:, :, :1] += emitted
        else:
            grad_p = grad_p + emitted / Nq
    # out is here for the kernels: sum_j p grad_p is <out, grad_out> plus the part of the scores.
    grad_logits = p * (grad_p - (p * grad_p).sum(3, keepdim=True))
    grad_q = grad_logits @ k_wide * scale
    grad_k = grad_logits.transpose(2, 3) @ _wide(q) * scale
    return tuple(_per_query(g.to(q.dtype)) for g in (grad_q, grad_k, grad_v))


def topk(score: Tensor, k: int, prefix: int = 1, fuse: bool = False) -> Tensor:
    _check.topk("topk", score, k, prefix)
    B, N = score.shape
    assign = torch.arange(N, device=score.device, dtype=torch.int32).repeat(B, 1)
    if k >= N - prefix:
        return assign
    patch = _wide(score[:, prefix:])
    patch = patch.masked_fill(patch.isnan(), -torch.inf)
    order = patch.sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(patch, dtype=torch.bool).scatter(1, order[:, :k], True)
    rows = prefix + kept.cumsum(1) - 1
    assign[:, prefix:] = torch.where(kept, rows, prefix + k if fuse else -1).int()
    return assign


def topk_gather(x: Tensor, score: Tensor, k: int, prefix: int = 1, *, fuse: str = "none") -> tuple[Tensor, Tensor]:
    _check.topk_gather(x, score, k, prefix, fuse)
    B, N, C = x.shape
    score = score.to(_wide(x).dtype)
    assign = topk(score, k, prefix, fuse != "none")
    if k >= N - prefix:
        return x.clone(memory_format=torch.contiguous_format), assign
    m = prefix + k  # the row of the dropped, if they are fused
    index = torch.arange(N, device=x.device).expand(B, -1)
    row = torch.where(assign < 0, m, assign.long())
    source = index.new_zeros(B, m + 1).scatter_(1, row, index)[:, :m]
    out = x.gather(1, source[..., None].expand(-1, -1, C))
    if fuse == "none":
        return out, assign
    fused, _ = merge(_wide(x), torch.where(assign == m, 0, -1).int(), 1, weight=score, reduce=fuse)
    return torch.cat([out, fused.to(x.dtype)], 1), assign


def add_topk_gather_norm(
    x: Tensor,
    branch: Tensor,
    score: Tensor,
    k: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    prefix: int = 1,
    branch_scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    fuse: str = "none",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.add_topk_gather_norm(x, branch, score, k, norm_weight, norm_bias, prefix, branch_scale, branch_bias, fuse)
    out, assign = topk_gather(residual(x, branch, branch_scale, branch_bias), score, k, prefix, fuse=fuse)
    return out, assign, _layer_norm(out, norm_weight, norm_bias, eps)
