"""METR's weights in a timm model, and the logits of its exits.

An exit is a small classifier of the class token behind an early block, trained along with the model; inference without
a word about exits never runs them.
"""

import threading
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ._refuse import check_uncompiled

EXIT_AT = ("post_block", "post_attn")
_PREFIX = "mid_heads."


def load_metr(model: nn.Module, state_dict: Mapping, *, exits: bool = False) -> nn.Module:
    """Loads a METR checkpoint into a timm model, in place.

    The checkpoint has timm's names, bare or under "model", and of the exit of block l, with classes n and width C:

        mid_heads.{l}.0.{weight [C], bias [C]}       LayerNorm, eps 1e-6
        mid_heads.{l}.1.{weight [C, C], bias [C]}    Linear, then tanh
        mid_heads.{l}.3.{weight [n, C], bias [n]}    Linear

    Args:
        model: timm's VisionTransformer with a class token, patched or not.
        exits: True adds the exits to the model, as `model.tokred_exits`, for `exit_logits`; they are then in its
            state_dict. False leaves them out. `tokred_kernels.remove` takes them away.

    Returns:
        The same model.

    Raises:
        ValueError: a name is missing or unknown, a shape differs, or exits are asked for and there are none. Nothing
            was changed.

    Source: Liu et al., "A Simple Romance Between Multi-Exit Vision Transformer and Token Reduction", ICLR 2024.
    """
    state_dict = state_dict.get("model", state_dict)
    heads = {name.removeprefix(_PREFIX): t for name, t in state_dict.items() if name.startswith(_PREFIX)}
    weights = {name: t for name, t in state_dict.items() if not name.startswith(_PREFIX)}
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("tokred_exits.")}
    found = nn.ModuleDict({index: _exit(model) for index in sorted({name.split(".")[0] for name in heads})})
    expected = {**own, **{_PREFIX + name: t for name, t in found.state_dict().items()}}
    problems = [f"{name} is missing" for name in expected if name not in state_dict]
    problems += [f"{name} is unknown" for name in state_dict if name not in expected]
    problems += [
        f"{name} is {list(t.shape)}, the model's {list(expected[name].shape)}"
        for name, t in state_dict.items()
        if name in expected and t.shape != expected[name].shape
    ]
    problems += [f"{_PREFIX}{i} is behind no block" for i in found if i not in map(str, range(len(model.blocks)))]
    if exits and not found:
        problems.append("there are no exits")
    if exits and not model.has_class_token:
        problems.append("the model has no class token for exits to read")
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"load_metr: the weights do not fit the model: {', '.join(problems[:4])}{more}")
    remove_exits(model)
    model.load_state_dict(weights)
    if exits:
        like = model.patch_embed.proj.weight
        found.to_empty(device=like.device).to(like.dtype).train(model.training)
        found.load_state_dict(heads)
        model.tokred_exits = found
    return model


def exit_logits(model: nn.Module, images: Tensor, *, exit_at: str = "post_block") -> tuple[Tensor, dict[int, Tensor]]:
    """The logits of a model and of each of its exits, {block: [B, classes]}, from one forward.

    Args:
        model: with the exits of `load_metr(model, state_dict, exits=True)`, patched or not, run eagerly.
        exit_at: what an exit reads: "post_block", the class token that leaves its block, as the published code;
            "post_attn", the class token between the attention and the MLP of its block, as the published figure.

    Raises:
        ValueError: the model has no exits or is compiled; an unknown exit_at.
    """
    if not hasattr(model, "tokred_exits"):
        raise ValueError("exit_logits: the model has no exits; load_metr(model, state_dict, exits=True) adds them")
    if exit_at not in EXIT_AT:
        raise ValueError(f"exit_logits: exit_at must be one of {', '.join(EXIT_AT)}, got {exit_at!r}")
    check_uncompiled("exit_logits", model)
    thread = threading.get_ident()  # modules and so their hooks are shared by threads
    found: dict[int, Tensor] = {}

    def read(index: int, x: Tensor) -> None:
        if threading.get_ident() == thread:
            found[index] = model.tokred_exits[str(index)](x[:, 0])

    def after_block(index: int, _block, _args, output) -> None:
        read(index, output[0] if isinstance(output, tuple) else output)

    def before_mlp(index: int, _norm, args) -> None:
        read(index, args[0])

    handles = []
    for index in sorted(map(int, model.tokred_exits)):
        block = model.blocks[index]
        if exit_at == "post_block":
            handles.append(block.register_forward_hook(partial(after_block, index)))
        else:  # norm2 reads the tokens after a reduction, which leaves the class token alone
            handles.append(block.norm2.register_forward_pre_hook(partial(before_mlp, index)))
    try:
        return model(images), found
    finally:
        for handle in handles:
            handle.remove()


def remove_exits(model: nn.Module) -> None:
    if hasattr(model, "tokred_exits"):
        del model.tokred_exits


def _exit(model: nn.Module) -> nn.Sequential:
    """On the meta device: no memory, and no random numbers taken."""
    C = model.embed_dim
    with torch.device("meta"):
        return nn.Sequential(nn.LayerNorm(C, eps=1e-6), nn.Linear(C, C), nn.Tanh(), nn.Linear(C, model.num_classes))
