"""METR's exits in a timm model, and their logits.

An exit is a small classifier of the class token behind an early block, trained along with the model; inference without
a word about exits never runs them.
"""

import threading
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import use_reentrant_ckpt
from timm.models import checkpoint
from torch import Tensor, nn

from ._refuse import check_uncompiled

EXIT_AT = ("post_block", "post_attn")


def add_exits(model: nn.Module, blocks: Sequence[int] = (3, 6, 9)) -> nn.Module:
    """Gives a timm model untrained exits behind some blocks, in place: `model.tokred_exits`, for `exit_logits`.

    They start as torch starts such layers, from the global generator, and replace exits that are there. State:
    tokred_exits.{l}.{0, 1, 3}.{weight, bias}, laid out as in `load_metr`.

    Args:
        model: timm's VisionTransformer with a class token, patched or not.
        blocks: from 0.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no class token, no classifier, or no such block. Nothing was changed.
    """
    if not model.has_class_token or model.num_classes < 1:
        missing = "classifier" if model.has_class_token else "class token"
        raise ValueError(f"add_exits: the model has no {missing}")
    if not set(blocks) <= set(range(len(model.blocks))):
        raise ValueError(f"add_exits: blocks must be below {len(model.blocks)}, got {blocks!r}")
    found = nn.ModuleDict({str(index): new_exit(model) for index in sorted(set(blocks))})
    attach(model, found)
    for module in found.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def exit_logits(model: nn.Module, images: Tensor, *, exit_at: str = "post_block") -> tuple[Tensor, dict[int, Tensor]]:
    """The logits of a model and of each of its exits, {block: [B, classes]}, from one forward.

    Args:
        model: with the exits of `add_exits` or of `load_metr(model, state_dict, exits=True)`, patched or not, run
            eagerly; a function that calls this may be compiled.
        exit_at: what an exit reads: "post_block", the class token that leaves its block, as the published code;
            "post_attn", the class token between the attention and the MLP of its block, as the published figure.

    Raises:
        ValueError: the model has no exits or is compiled; an unknown exit_at; "post_attn" in training under reentrant
            checkpointing, which keeps no gradients inside a block.
    """
    if not hasattr(model, "tokred_exits"):
        raise ValueError("exit_logits: the model has no exits: add_exits(model), load_metr(..., exits=True)")
    if exit_at not in EXIT_AT:
        raise ValueError(f"exit_logits: exit_at must be one of {', '.join(EXIT_AT)}, got {exit_at!r}")
    check_uncompiled("exit_logits", model)
    if exit_at == "post_attn":
        return _exits_inside(model, images)
    patched = hasattr(model, "tokred_method")
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    size = None
    removed = model._schedule(x) if patched else (None,) * len(model.blocks)
    found: dict[int, Tensor] = {}
    for index, (block, r) in enumerate(zip(model.blocks, removed, strict=True)):
        # Not by hooks: under reentrant checkpointing they would see tokens without gradients.
        if patched:
            x, size = model._run(block, x, size, r)
        else:
            x = checkpoint(block, x) if model.grad_checkpointing else block(x)
        if str(index) in model.tokred_exits:
            found[index] = model.tokred_exits[str(index)](x[:, 0])
    x = model.norm(x)
    return (model.forward_head(x, size=size) if patched else model.forward_head(x)), found


def _exits_inside(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """`exit_logits` with "post_attn"."""
    if model.grad_checkpointing and use_reentrant_ckpt() and torch.is_grad_enabled():
        raise ValueError("exit_logits: post_attn has no gradients under reentrant checkpointing")
    thread = threading.get_ident()  # modules and so their hooks are shared by threads
    tokens: dict[int, Tensor] = {}

    def before_mlp(index: int, _norm, args) -> None:
        if threading.get_ident() == thread:
            tokens[index] = args[0][:, 0]

    # norm2 reads the tokens after a reduction, which leaves the class token alone. The exits run behind the forward:
    # within, checkpointing would expect them to run again.
    handles = [
        model.blocks[int(index)].norm2.register_forward_pre_hook(partial(before_mlp, int(index)))
        for index in model.tokred_exits
    ]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, {index: model.tokred_exits[str(index)](x) for index, x in sorted(tokens.items())}


def remove_exits(model: nn.Module) -> nn.Module:
    """Takes the exits away, in place; a model without any is left as it is. Returns the same model."""
    if hasattr(model, "tokred_exits"):
        del model.tokred_exits
    return model


def attach(model: nn.Module, exits: nn.ModuleDict) -> None:
    """Makes exits of `new_exit` those of the model, with memory for weights that are still to be set."""
    like = model.patch_embed.proj.weight
    model.tokred_exits = exits.to_empty(device=like.device).to(like.dtype).train(model.training)


def new_exit(model: nn.Module) -> nn.Sequential:
    """On the meta device: no memory, and no random numbers taken."""
    C = model.embed_dim
    with torch.device("meta"):
        return nn.Sequential(nn.LayerNorm(C, eps=1e-6), nn.Linear(C, C), nn.Tanh(), nn.Linear(C, model.num_classes))
