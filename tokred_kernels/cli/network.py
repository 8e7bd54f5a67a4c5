"""A timm model by name, with pretrained or seeded random weights, the same for every command."""

import argparse
import difflib
import importlib.util
import logging

import torch
from torch import nn

from .errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --pretrained and --seed; the command adds `model`."""
    add = parser.add_argument
    add("--pretrained", action="store_true", help="pretrained weights, through timm (default: random weights)")
    add("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")


def create(args: argparse.Namespace) -> nn.Module:
    """The model `args.model` in eval mode.

    Raises:
        UserError: timm has no such model, or no pretrained weights for it.
    """
    import timm

    check(args.model)
    torch.manual_seed(args.seed)
    try:
        return timm.create_model(args.model, pretrained=args.pretrained).eval()
    except Exception as error:  # whatever a download may raise: hub, socket, file format
        if not args.pretrained:
            raise
        raise UserError(f"no pretrained weights for {args.model}: {type(error).__name__}: {error}") from None


def check(model: str) -> None:
    """Raises UserError if timm has no such model."""
    import timm

    for name in ("timm", "huggingface_hub"):  # their warnings would join the one line of an error
        logging.getLogger(name).setLevel(logging.ERROR)
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise UserError(f"timm has no model {model!r}" + (f"; close: {', '.join(close)}" if close else ""))


def weights(args: argparse.Namespace) -> str:
    """The kind of weights, for results: "pretrained" or "random (seed 0)"."""
    return "pretrained" if args.pretrained else f"random (seed {args.seed})"


def need(command: str, *packages: str) -> None:
    """Raises UserError if `tokred <command>` misses packages, naming them."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"tokred {command} needs {', '.join(missing)}: pip install 'tokred-kernels[cli]'")
