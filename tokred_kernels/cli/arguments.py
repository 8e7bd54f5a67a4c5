"""Values of arguments that several commands take."""

import argparse

import torch

from .errors import UserError


def at_least_one(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def integers(text: str) -> int | list[int]:
    """The type of a number, or a list of them."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or a list such as 16,16,8, got {text!r}") from None
    return values[0] if len(values) == 1 else values


def numbers(text: str) -> float | list[float]:
    """As `integers`, of floats."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or a list such as 0.9,0.7,0.5, got {text!r}") from None
    return values[0] if len(values) == 1 else values


def integer_list(text: str) -> list[int]:
    """As `integers`, always a list."""
    values = integers(text)
    return values if isinstance(values, list) else [values]


def device(name: str | None) -> str:
    """ "cpu" or "cuda:0" of --device; without a name, a GPU if there is one.

    Raises:
        UserError: neither a CPU nor a CUDA device, or not that many.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind, index = torch.device(name).type, torch.device(name).index
    except RuntimeError:
        kind, index = "", None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}")
    if kind == "cpu":
        return kind
    if (index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return f"cuda:{index or 0}"
