"""Yardsticks for a reduced timm model: the oracle, and the method in plain PyTorch.

    oracle_model   tokens sliced to the method's counts: what the model would cost if the reduction were free
    plain_model    the method as a practitioner writes it: some twenty small ops a step, explicit or fused attention

Both work on copies that share the weights of the model they are given, so that several variants can be timed side by
side without several sets of weights in memory or in the caches.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .timm import ReducedBlock

ATTENTION = ("explicit", "sdpa")


def shared_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the modules of a model over the same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def oracle_model(model: nn.Module, counts: Sequence[tuple[int, int]], *, attention: str = "sdpa") -> nn.Module:
    """The model with its tokens sliced to those that each attention and each MLP of a reduced model sees.

    Args:
        model: a timm VisionTransformer; left unchanged, its weights shared.
        counts: (tokens in attention, tokens in the MLP) of each block, as `tokred_kernels.schedule.tokens` has them.
        attention: "sdpa", timm's own, for which torch picks its best kernel, or "tokred", that of a patched block.
    """
    if attention not in ("sdpa", "tokred"):
        raise ValueError(f"oracle_model: attention must be sdpa or tokred, got {attention!r}")
    return _Oracle(shared_copy(model), counts, attention == "tokred")


def plain_model(
    model: nn.Module,
    removed: Sequence[int],
    *,
    method: str = "tome",
    attention: str = "explicit",
    scores: str = "cls",
    fuse: str = "none",
) -> nn.Module:
    """The model with a reduction method in plain PyTorch: no kernel of ours, float32 matching.

    Args:
        model: a timm VisionTransformer with a token or an average-pool head; left unchanged, its weights shared.
        removed: patches that each block removes; of ToMe at most half of them, as the ops do.
        method: a key of PLAIN.
        attention: "explicit" (softmax(q k^T * scale + log size) v, as the published code of these methods does) or
            "sdpa" (scaled_dot_product_attention with log size as a broadcast key mask, scores computed beside it).
        scores, fuse: of the methods that select, see `tokred_kernels.topk_gather` and `tokred_kernels.attention`.

    Raises:
        ValueError: an unknown method or attention, or a head that has no plain form here.
    """
    if method not in PLAIN:
        raise ValueError(f"plain_model: method must be one of {', '.join(PLAIN)}, got {method!r}")
    if attention not in ATTENTION:
        raise ValueError(f"plain_model: attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    if model.global_pool not in ("token", "avg", ""):
        raise ValueError(f"plain_model: no plain form for the {model.global_pool!r} head")
    return PLAIN[method](shared_copy(model), removed, attention, scores, fuse)


def eager_match(keys: Tensor, r: int, prefix: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's matching in plain PyTorch: normalise, matmul, max, argsort.

    Args:
        keys: [B, H, N, D].
        r: patches to remove, at most half of them.

    Returns:
        gone [B, r] and kept [B, Na - r] (ascending), which index the even patches, and into [B, r], which indexes the
        odd ones. Ties and NaN fall as torch.max and torch.argsort let them.
    """
    metric = (keys if keys.dtype == torch.float64 else keys.float()).mean(1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = _parity(metric, prefix)
    best, partner = (even @ odd.transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True)
    gone, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    return gone, kept, partner.gather(1, gone)


def eager_merge(x: Tensor, size: Tensor | None, plan: tuple, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """ToMe's size-weighted merge in plain PyTorch: gather, scatter, concatenate, divide.

    Args:
        x: [B, N, C].
        size: [B, N], or None for all ones.
        plan: (gone, kept, into) of `eager_match`.

    Returns:
        [B, N - r, C] in the dtype of x, and the new sizes [B, N - r] in float32.
    """
    gone, kept, into = plan
    size = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
    size = size[..., None]

    def add_up(value: Tensor) -> Tensor:
        even, odd = _parity(value, prefix)
        wide = (-1, -1, value.shape[-1])
        moved = even.gather(1, gone[..., None].expand(wide))
        odd = odd.scatter_add(1, into[..., None].expand(wide), moved)
        return torch.cat([value[:, :prefix], even.gather(1, kept[..., None].expand(wide)), odd], 1)

    total = add_up(size)
    return (add_up(x * size) / total).to(x.dtype), total[..., 0]


def eager_unmerge(y: Tensor, assign: Tensor) -> Tensor:
    """y[assign] along the tokens, [B, N, C]; every entry of assign names a row."""
    B, M, C = y.shape
    flat = assign + M * torch.arange(B, device=y.device, dtype=torch.int32)[:, None]
    return y.flatten(0, 1).index_select(0, flat.flatten()).view(B, -1, C)  # copies rows: 3 to 4x faster than gather


def eager_tome_step(
    x: Tensor, keys: Tensor, r: int, prefix: int = 1, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of token merging in plain PyTorch: the bar that match_merge is measured against."""
    return eager_merge(x, size, eager_match(keys, r, prefix), prefix)


def eager_select(x: Tensor, scores: Tensor, r: int, prefix: int = 1, fuse: str = "none") -> Tensor:
    """One step of EViT or Top-K in plain PyTorch, patches by falling score as published: argsort, gather, sum, cat.

    Args:
        x: [B, N, C]; scores: [B, N].
        r: patches to drop or fuse.
    """
    patches, scores = x[:, prefix:], scores[:, prefix:]
    k = patches.shape[1] - r
    order = scores.argsort(dim=1, descending=True)
    patches = patches.gather(1, order[..., None].expand_as(patches))
    rows = [x[:, :prefix], patches[:, :k]]
    if fuse != "none":
        weight = scores.gather(1, order[:, k:])[..., None]
        fused = (patches[:, k:] * weight).sum(1, keepdim=True)
        rows.append((fused / weight.sum(1, keepdim=True) if fuse == "mean" else fused).to(x.dtype))
    return torch.cat(rows, 1)


def _parity(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The patches at even and at odd positions, positions counted from the first prefix token."""
    return x[:, prefix + prefix % 2 :: 2], x[:, prefix + 1 - prefix % 2 :: 2]


class _Baseline(nn.Module):
    """Runs the blocks of a timm model one by one; `blocks` decides how the tokens become fewer."""

    def __init__(self, model: nn.Module, plan: Sequence):
        super().__init__()
        if len(plan) != len(model.blocks):
            raise ValueError(f"a baseline needs {len(model.blocks)} entries, one a block, got {len(plan)}")
        self.model = model
        self.plan = tuple(plan)

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        x, size = self.blocks(x)
        return self.head(model.norm(x), size)

    def head(self, x: Tensor, size: Tensor | None) -> Tensor:
        return self.model.forward_head(x)


class _Oracle(_Baseline):
    def __init__(self, model: nn.Module, counts: Sequence[tuple[int, int]], patched: bool):
        super().__init__(model, counts)
        self.patched = patched
        for block in model.blocks if patched else ():
            block.__class__ = ReducedBlock

    def blocks(self, x: Tensor) -> tuple[Tensor, None]:
        for block, (n, m) in zip(self.model.blocks, self.plan, strict=True):
            if n < x.shape[1]:
                x = x[:, :n].contiguous()
            if self.patched:
                attended = block.attend(*block.project(x))[0]
            else:
                attended = block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            # Sliced before the addition: its result is then dense in memory, and no copy is charged to the oracle.
            x = x[:, :m] + attended[:, :m]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, None


class _Plain(_Baseline):
    """A method in plain PyTorch; subclasses reduce the tokens between attention and MLP."""

    scored = False

    def __init__(self, model: nn.Module, removed: Sequence[int], attention: str, scores: str, fuse: str):
        super().__init__(model, removed)
        self.attention = attention
        self.scores = scores
        self.fuse = fuse

    def blocks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        size = None
        for block, r in zip(self.model.blocks, self.plan, strict=True):
            attended, keys, scores = self.attend(block.attn, block.norm1(x), size, self.scored and r > 0)
            x = x + block.drop_path1(block.ls1(attended))
            x, size = self.reduce(x, size, r, keys, scores)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, size

    def reduce(
        self, x: Tensor, size: Tensor | None, r: int, keys: Tensor, scores: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def attend(
        self, attn: nn.Module, x: Tensor, size: Tensor | None, scored: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output of timm's Attention with log size on its keys, the keys [B, H, N, D], the scores [B, N]."""
        B, N, _ = x.shape
        q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = None if size is None else size.log()[:, None, None, :].to(q.dtype)
        if self.attention == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            scored_rows = q[:, :, :1] if self.scores == "cls" else q
            p = ((scored_rows * attn.scale) @ k.transpose(-2, -1)).softmax(-1) if scored else None
        else:
            logits = (q * attn.scale) @ k.transpose(-2, -1)
            p = (logits if bias is None else logits + bias).softmax(-1)
            out = p @ v
        out = out.transpose(1, 2).reshape(B, N, attn.attn_dim)
        scores = (p[:, :, 0].mean(1) if self.scores == "cls" else p.mean((1, 2))) if scored else None
        return attn.proj_drop(attn.proj(attn.norm(out))), k, scores

    def head(self, x: Tensor, size: Tensor | None) -> Tensor:
        model = self.model
        if model.global_pool != "avg" or size is None:
            return model.forward_head(x)
        first = 0 if model.pool_include_prefix else model.num_prefix_tokens
        weight = size[:, first:, None]
        pooled = ((x[:, first:] * weight).sum(1) / weight.sum(1)).to(x.dtype)
        return model.head(model.head_drop(model.fc_norm(pooled)))


class _PlainToMe(_Plain):
    def reduce(self, x, size, r, keys, scores):
        prefix = self.model.num_prefix_tokens
        r = max(0, min(r, (x.shape[1] - prefix) // 2))
        return eager_tome_step(x, keys, r, prefix, size) if r > 0 else (x, size)


class _PlainSelection(_Plain):
    scored = True

    def reduce(self, x, size, r, keys, scores):
        return (eager_select(x, scores, r, self.model.num_prefix_tokens, self.fuse) if r > 0 else x), None


PLAIN: dict[str, type[_Plain]] = {
    "tome": _PlainToMe,
    "topk": _PlainSelection,
    "evit": _PlainSelection,
    "metr": _PlainSelection,
}
