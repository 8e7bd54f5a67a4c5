"""Published checkpoints in timm models, patched or not."""

import re
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from .metr import attach, new_exit, remove_exits

_EXITS = "mid_heads."
_PART = re.compile(r"(?:score_predictor|cluster_layers)\.(\d+)\.")


def load_published(model: nn.Module, checkpoint: Mapping, *, ema: bool = False, exits: bool = False) -> nn.Module:
    """Loads a checkpoint of DeiT, EViT, METR, MCTF, DynamicViT or "Which Tokens to Use?" into a timm model, in place.

    The checkpoint has timm's names, bare or under "model". Of models with learned parts, those of stage i are called
    score_predictor.{i} (DynamicViT) or cluster_layers.{i} (DPC-KNN, SiT, PatchMerger, Sinkhorn); patched with the
    method, options as trained, the model takes them to its i-th block with a part. Exits are as in `load_metr`.
    Position embeddings of another resolution are resized, bicubically, those of prefix tokens kept.

    Args:
        model: timm's VisionTransformer, patched or not.
        ema: the averaged weights, under "state_dict_ema" or "model_ema".
        exits: as in `load_metr`.

    Returns:
        The same model.

    Raises:
        ValueError: a name is missing or unknown, a shape differs, or averaged weights or exits are asked for and there
            are none. Nothing was changed.
    """
    return _load("load_published", model, checkpoint, ema, exits)


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
    return _load("load_metr", model, state_dict, False, exits)


def mismatches(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from being loaded: names that are missing or unknown, and other shapes."""
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {list(t.shape)}, the model's {list(own[name].shape)}"
        for name, t in weights.items()
        if name in own and t.shape != own[name].shape
    ]
    return problems


def few(problems: list[str]) -> str:
    """The first four, and how many more."""
    return ", ".join(problems[:4]) + (f", and {len(problems) - 4} more" if len(problems) > 4 else "")


def _load(caller: str, model: nn.Module, checkpoint: Mapping, ema: bool, exits: bool) -> nn.Module:
    given = _renamed(model, _weights(caller, checkpoint, ema))
    heads = {name.removeprefix(_EXITS): t for name, t in given.items() if name.startswith(_EXITS)}
    weights = {name: t for name, t in given.items() if not name.startswith(_EXITS)}
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("tokred_exits.")}
    _resize_positions(model, weights, own)
    found = nn.ModuleDict({index: new_exit(model) for index in sorted({name.split(".")[0] for name in heads})})
    expected = {**own, **{_EXITS + name: t for name, t in found.state_dict().items()}}
    problems = mismatches(expected, {**given, **weights})
    problems += [f"{_EXITS}{i} is behind no block" for i in found if i not in map(str, range(len(model.blocks)))]
    if exits and not found:
        problems.append("there are no exits")
    if exits and not model.has_class_token:
        problems.append("the model has no class token for exits to read")
    if problems:
        raise ValueError(f"{caller}: the weights do not fit the model: {few(problems)}")
    remove_exits(model)
    model.load_state_dict(weights)
    if exits:
        attach(model, found)
        found.load_state_dict(heads)
    return model


def _weights(caller: str, checkpoint: Mapping, ema: bool) -> Mapping[str, Tensor]:
    if not ema:
        return checkpoint.get("model", checkpoint)
    for name in ("state_dict_ema", "model_ema"):
        if name in checkpoint:
            return checkpoint[name]
    raise ValueError(f"{caller}: the checkpoint holds no averaged weights, under state_dict_ema or model_ema")


def _renamed(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The learned parts of stages under the names of their blocks."""
    parts = [index for index, block in enumerate(model.blocks) if getattr(block, "tokred_part", None) is not None]

    def name(given: str) -> str:
        stage = _PART.match(given)
        if stage is None or int(stage[1]) >= len(parts):
            return given
        return f"blocks.{parts[int(stage[1])]}.tokred_part.{given[stage.end() :]}"

    return {name(given): t for given, t in weights.items()}


def _resize_positions(model: nn.Module, weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    table = weights.get("pos_embed")
    if table is None or "pos_embed" not in own or table.dim() != 3 or table.shape == own["pos_embed"].shape:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = round(max(0, table.shape[1] - prefix) ** 0.5)
    if side and side * side == table.shape[1] - prefix and table.shape[2] == own["pos_embed"].shape[2]:
        with torch.no_grad():
            grid = list(model.patch_embed.grid_size)
            weights["pos_embed"] = resample_abs_pos_embed(table, grid, num_prefix_tokens=prefix)
