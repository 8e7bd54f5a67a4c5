"""Checkpoints that are whole or absent, whatever happens while they are written."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..models.published import few, mismatches
from .settings import BadInput


def save(path: Path, state: dict) -> None:
    """torch.save by `replace`."""
    replace(path, lambda file: torch.save(state, file))


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes beside the file, waits for the disk, then takes its place: `path` is the old or the new one, never half.

    Raises:
        BadInput: the file cannot be written; the old one is still there.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, has to reach the disk
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
        raise BadInput(f"cannot save {path}: {error}") from None


def load(path: Path) -> dict:
    """The contents of a file of `save`, or of any other with tensors and plain values only.

    Raises:
        BadInput: there is none, or it is no checkpoint.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"no such checkpoint: {path}") from None
    except Exception as error:  # whatever unpickling a file of any kind may raise
        raise BadInput(f"{path} is no checkpoint: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, Mapping):
        raise BadInput(f"{path} is no checkpoint: it holds a {type(found).__name__}")
    return dict(found)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Loads weights that must fit: the same names and shapes. Exits are left out where the model has none.

    Raises:
        BadInput: they do not fit; the model is as it was.
    """
    if not hasattr(model, "tokred_exits"):
        weights = {name: t for name, t in weights.items() if not name.startswith("tokred_exits.")}
    check_weights(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def check_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: object) -> None:
    """Raises BadInput unless the weights have the model's own names and shapes."""
    problems = mismatches(own, weights)
    if problems:
        raise BadInput(f"{source} is of another model: {few(problems)}")
