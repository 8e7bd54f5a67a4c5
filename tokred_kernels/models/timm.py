"""Token reduction in timm's VisionTransformer: apply() and remove().

The model and its blocks become the subclasses below, so hooks, state_dict, deepcopy, pickle and compilation see an
ordinary module. Sizes travel from block to block as values; nothing of a forward stays on the model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, LayerScale
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .. import methods
from ..ops import unmerge
from ..trace import compose
from ._attention import attend
from ._inference import is_idle, is_watched, through, without_autograd
from ._norm import fuses_norm, normed_linear
from ._refuse import check_model
from ._size import key_mask, weighted_mean
from .metr import remove_exits


def apply(model: nn.Module, method: str, **options) -> nn.Module:
    """Makes a timm model reduce its tokens, in place.

        tokred.apply(model, "tome", r=13)

    The model computes what the method says and nothing else changes: weights, state_dict, training, gradient
    checkpointing, compilation and export work as before. Where nothing is removed (r = 0 or a keep rate of 1
    throughout), every block runs timm's own forward and the results are bit for bit those of the unpatched model.
    Class, distillation and register tokens are never touched.

    forward_features returns the reduced tokens. forward_intermediates and get_intermediate_layers give every token
    the value of its row, on the full grid: that of the token it was merged or fused into, 0 if it was dropped. Heads,
    where tokens merge: average pooling weighs them by size, attention pooling adds log size to its logits, max pooling
    is unchanged; where they are dropped or fused: they pool what is left. attn_mask and is_causal are refused, and so
    is training with attention dropout where attention emits scores.
    The attention module's parts are called, but not its own forward, nor its forward hooks.

    Args:
        model: timm's VisionTransformer or VisionTransformerDistilled with plain blocks; not yet compiled or wrapped.
        method: a name in `tokred_kernels.methods.METHODS`: "tome", "topk", "evit", "radial", ...
        options: of the method; see its class there.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown method or option, a model that is patched already, or a part of it that is not
            understood. Nothing was changed.
    """
    chosen = methods.create(method, options)
    check_model(model)
    chosen.check(model)
    model.tokred_method = chosen
    model.tokred_depth = len(model.blocks)  # its blocks may be pruned later, the schedule stays
    parts = [chosen.part(model, index) for index in range(len(model.blocks))]
    for block, part in zip(model.blocks, parts, strict=True):
        block.tokred_method = chosen
        block.tokred_prefix = model.num_prefix_tokens
        block.tokred_part = None if part is None else part.to(next(block.parameters())).train(block.training)
        block.__class__ = ReducedBlock
    model.__class__ = _REDUCED[type(model)]
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes `apply`, in place, and takes away the exits of `load_metr`; any other model is left as it is.

    Raises:
        ValueError: the patched model was wrapped or compiled since. Nothing was changed.
    """
    if any(isinstance(m, _Reduced | ReducedBlock) for m in model.modules()):
        dense = {reduced: dense for dense, reduced in _REDUCED.items()}
        if type(model) not in dense or any(type(block) is not ReducedBlock for block in model.blocks):
            raise ValueError(f"remove: {type(model).__name__} holds a patched model; unwrap and uncompile it first")
        for block in model.blocks:
            del block.tokred_method, block.tokred_prefix, block.tokred_part
            block.__class__ = Block
        del model.tokred_method, model.tokred_depth
        model.__class__ = dense[type(model)]
    remove_exits(model)
    return model


class ReducedBlock(Block):
    """timm's Block with a method's step in it: `x, size = block(x, size, r)`."""

    def forward(
        self, x: Tensor, size: Tensor | None = None, r: int | None = None, with_assign: bool = False
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, N, C], size [B, N] to [B, M, C], [B, M]; with_assign: and assign [B, N], None if not reduced.

        Without r, and without sizes to honour, it is timm's own forward.
        """
        if r is None and size is None:
            x, assign = super().forward(x), None
        else:
            x, size, assign = self.tokred_method.step(self, x, size, 0 if r is None else r)
        if not with_assign:
            return x, size
        return x, size, assign() if callable(assign) else assign

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, D], views of one projection."""
        q, k, v = self.split_heads(self.attn.qkv(self.norm1(x)))
        return through(q, self.attn.q_norm), through(k, self.attn.k_norm), v

    def projections(self) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]]:
        """`project` in two parts: what gives queries and keys, and what gives values."""
        attn, qkv = self.attn, self.attn.qkv
        rows = [2 * attn.attn_dim, attn.attn_dim]  # split once: the gradients of two slices would be two whole matrices
        weights = qkv.weight.split(rows)
        biases = (None, None) if qkv.bias is None else qkv.bias.split(rows)

        def queries_keys(x: Tensor) -> tuple[Tensor, Tensor]:
            q, k = self.split_heads(normed_linear(self.norm1, x, weights[0], biases[0]))
            return through(q, attn.q_norm), through(k, attn.k_norm)

        def values(x: Tensor) -> Tensor:
            v = normed_linear(self.norm1, x, weights[1], biases[1])
            return v.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2)

        return queries_keys, values

    def split_heads(self, y: Tensor) -> tuple[Tensor, ...]:
        """[B, N, n H D] to n views [B, H, N, D]."""
        B, N, width = y.shape
        H, D = self.attn.num_heads, self.attn.head_dim
        return y.reshape(B, N, width // (H * D), H, D).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scores: str = "none"
    ) -> tuple[Tensor, Tensor | None]:
        """The attention branch [B, N, C], each key counted size times, and the scores [B, N]."""
        y, emitted = self.heads(q, k, v, size, scores)
        return self.branch(y), emitted

    def heads(
        self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scores: str = "none"
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads give, [B, H, N, D] stored [B, N, H, D], and the scores: `attend` before its `branch`."""
        dropout = self.attn.attn_drop.p if self.training else 0.0
        return attend(q, k, v, size, scores=scores, dropout=dropout)

    def branch(self, y: Tensor) -> Tensor:
        """The attention branch [B, N, C] of what the heads give, [B, H, N, D]."""
        attn = self.attn
        return through(self._joined(y), attn.proj, attn.proj_drop, self.ls1, self.drop_path1)

    def _joined(self, y: Tensor) -> Tensor:
        return through(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], self.attn.attn_dim), self.attn.norm)

    def _unfinished(self, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`branch` without what a fused tail adds to it: the scale [C] of its LayerScale and the bias [C] of its
        projection, which torch's float32 product on a CPU adds in a pass of its own."""
        proj = self.attn.proj
        scale = self.ls1.gamma if type(self.ls1) is LayerScale and not is_watched(self.ls1) else None
        rest = (self.attn.proj_drop, *(() if scale is not None else (self.ls1,)), self.drop_path1)
        y = self._joined(y)
        plain = type(proj) is nn.Linear and not is_watched(proj) and all(map(is_idle, rest))
        if plain and y.is_cpu and y.dtype == torch.float32:
            return F.linear(y, proj.weight), scale, proj.bias
        return through(y, proj, *rest), scale, None

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP branch [B, N, C]."""
        return self.feed_normed(self.norm2(x))

    def feed_normed(self, y: Tensor) -> Tensor:
        """That of what norm2 gave."""
        return through(y, self.mlp, self.ls2, self.drop_path2)

    def merge_and_norm(
        self, x: Tensor, y: Tensor, assign: Tensor, m: int, size: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From what the heads of x give, [B, H, N, D], to the MLP, where tokens merge: x [B, m, C], its sizes,
        norm2(x)."""
        norm = self.norm2
        if not fuses_norm(norm, x, y):
            x, size = torch.ops.tokred.merge(x + self.branch(y), assign, m, size)
            return x, size, norm(x)
        branch, scale, bias = self._unfinished(y)
        with without_autograd():
            return torch.ops.tokred.add_merge_norm(
                x, branch, assign, m, norm.weight, norm.bias, size, scale, bias, eps=norm.eps
            )

    def select_and_norm(self, x: Tensor, y: Tensor, score: Tensor, k: int, fuse: str) -> tuple[Tensor, Tensor, Tensor]:
        """The same where the k patches with the best scores [B, N] stay: x [B, M, C], assign [B, N], norm2(x)."""
        norm, prefix = self.norm2, self.tokred_prefix
        if not fuses_norm(norm, x, y):
            x, assign = torch.ops.tokred.topk_gather(x + self.branch(y), score, k, prefix, fuse=fuse)
            return x, assign, norm(x)
        branch, scale, bias = self._unfinished(y)
        with without_autograd():
            return torch.ops.tokred.add_topk_gather_norm(
                x, branch, score, k, norm.weight, norm.bias, prefix, scale, bias, fuse=fuse, eps=norm.eps
            )


class _Reduced:
    """The forward of a patched model, in front of timm's class."""

    tokred_method: methods.Method
    tokred_depth: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, size = self._reduce(x, attn_mask, is_causal)
        return self.forward_head(x, size=size)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self._reduce(x, attn_mask, is_causal)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False, size: Tensor | None = None) -> Tensor:
        x = self.head_drop(self.fc_norm(self.pool(x, size=size)))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor, pool_type: str | None = None, size: Tensor | None = None) -> Tensor:
        """timm's pooling of x [B, N, C], each token counted size [B, N] times."""
        pool = self.attn_pool
        kind = (self.global_pool if pool_type is None else pool_type) if pool is None else "attention"
        method = self.tokred_method
        if kind not in ("avg", "avgmax", "attention") and not (kind == "max" and method.masks):
            return super().pool(x, pool_type)
        if size is None:
            weighs = method.sized or (method.trains_size and self.training)
            if weighs and self._reduces(x) and (method.masks or not self._is_full(x)):
                raise ValueError(
                    f"forward_head: {kind} pooling must weigh reduced tokens by their size, which forward_features "
                    "does not return; call the model, or pass size="
                )
            return super().pool(x, pool_type)
        if not self.pool_include_prefix:
            x, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
        if kind == "avg":
            return weighted_mean(x, size)
        if kind in ("max", "avgmax"):
            highest = x.masked_fill((size == 0)[..., None], -torch.inf).amax(1) if method.masks else x.amax(1)
            return highest if kind == "max" else 0.5 * (highest + weighted_mean(x, size))
        if isinstance(pool, AttentionPoolLatent):
            return pool(x, attn_mask=key_mask(size, x.dtype))
        return _refine(pool, x, size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ):
        """timm's, with every token of the full grid, in the final features too.

        forward_head accepts those, but where it pools, tokens that were dropped count as 0.
        """
        _refuse_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        image = x.shape[-2:]
        x, size, source = self._embed(x), None, None
        grids = []
        for index, (block, r) in enumerate(zip(self.blocks, self._schedule(x), strict=True)):
            if stop_early and index > last:
                break
            x, size, assign = self._run(block, x, size, r, True)
            source = compose(source, assign)
            if index in taken:
                grids.append(_full_grid(self.norm(x) if norm else x, source))

        prefix = [y[:, : self.num_prefix_tokens] for y in grids]
        grids = [y[:, self.num_prefix_tokens :] for y in grids]
        if output_fmt == "NCHW":
            H, W = self.patch_embed.dynamic_feat_size(image)
            grids = [y.unflatten(1, (H, W)).permute(0, 3, 1, 2).contiguous() for y in grids]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0

        if output_dict:
            result = {"image_intermediates": grids}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = _full_grid(self.norm(x), source)
            return result
        if return_prefix_tokens:
            grids = list(zip(grids, prefix, strict=True))
        return grids if intermediates_only else (_full_grid(self.norm(x), source), grids)

    def _embed(self, x: Tensor) -> Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def _schedule(self, x: Tensor, method: methods.Method | None = None) -> tuple[int | None, ...]:
        """r of each block for tokens x [B, N, C] that enter the first; None where nothing is removed throughout."""
        removed = (method or self.tokred_method).schedule(self.tokred_depth, x.shape[1] - self.num_prefix_tokens)
        removed = removed[: len(self.blocks)]
        return removed if any(removed) else (None,) * len(removed)

    def _run(self, block: nn.Module, *args):
        if not self.grad_checkpointing:
            return block(*args)
        x, size, *assign = checkpoint(block, *args)
        # Reentrant checkpointing makes every floating output ask for a gradient.
        if size is not None and not self.tokred_method.trains_size:
            size = size.detach()
        return x, size, *assign

    def _reduce(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor | None]:
        """Images to normalised tokens [B, M, C] and their sizes [B, M], None if nothing merges."""
        _refuse_mask(attn_mask, is_causal)
        x, size = self._embed(x), None
        for block, r in zip(self.blocks, self._schedule(x), strict=True):
            x, size = self._run(block, x, size, r)
        return self.norm(x), size

    def _reduces(self, x: Tensor) -> bool:
        """Whether the images of features x lost tokens. By their full number of patches, where it is one for all
        images: what is left may be few enough to be left alone."""
        fixed = not self.dynamic_img_size and isinstance(self.patch_drop, nn.Identity)
        patches = self.patch_embed.num_patches if fixed else x.shape[1] - self.num_prefix_tokens
        return any(self.tokred_method.schedule(self.tokred_depth, patches)[: len(self.blocks)])

    def _is_full(self, x: Tensor) -> bool:
        """Whether x is certain to hold every token: only where images have one size is the full count known."""
        full = self.patch_embed.num_patches + self.num_prefix_tokens
        return not self.dynamic_img_size and self.pos_embed is not None and x.shape[1] == full


class ReducedVisionTransformer(_Reduced, VisionTransformer):
    pass


class ReducedVisionTransformerDistilled(_Reduced, VisionTransformerDistilled):
    def forward_head(self, x: Tensor, pre_logits: bool = False, size: Tensor | None = None) -> Tensor:
        return VisionTransformerDistilled.forward_head(self, x, pre_logits)  # reads the two prefix tokens only


_REDUCED = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedVisionTransformerDistilled,
}


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a model with token reduction takes no attn_mask or is_causal: its tokens move")


def _full_grid(y: Tensor, source: Tensor | None) -> Tensor:
    return y if source is None else unmerge(y, source)


def _refine(pool: nn.Module, x: Tensor, size: Tensor) -> Tensor:
    """timm's AttentionPoolPrr, parameter-free self-attention before pooling, of tokens with sizes."""
    B, N, C = x.shape
    y = pool.pre_norm(x).reshape(B, N, pool.num_heads, pool.head_dim).transpose(1, 2)
    y, _ = attend(y, y, y, size)
    y = pool.post_norm(y.transpose(1, 2).reshape(B, N, C))
    return y[:, 0] if pool.pool == "token" else weighted_mean(y, size)
