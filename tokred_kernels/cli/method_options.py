"""The options of the reduction methods on the command line, the same for every command."""

import argparse
import dataclasses

from .. import methods
from .errors import UserError

# Of an option that a method needs and that was not given.
DEFAULTS = {"r": 13, "keep_rate": 0.7}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --method and an argument for each option; `chosen` reads them."""
    add = parser.add_argument
    add("--method", default="tome", help=f"reduction method: {', '.join(methods.METHODS)} (default: %(default)s)")
    add("--r", type=_integers, help=f"tokens to remove in each block, or a list r,r,... (default: {DEFAULTS['r']})")
    add("--inflection", type=float, help="slope of r over the blocks, -1 (most removed early) to 1 (late)")
    add(
        "--keep-rate",
        type=_numbers,
        metavar="RATE",
        help=f"share of the patches to keep in each stage, or a list (default: {DEFAULTS['keep_rate']})",
    )
    add("--stages", type=_blocks, metavar="BLOCK,...", help="the blocks that reduce, from 0 (default: the method's)")


def chosen(args: argparse.Namespace) -> dict:
    """The options for `tokred_kernels.apply(model, args.method, **options)`.

    Raises:
        UserError: an unknown method, or options that it does not take.
    """
    given = {name: getattr(args, name) for name in ("r", "keep_rate", "stages")}
    options = {name: value for name, value in given.items() if value is not None}
    for field in dataclasses.fields(methods.METHODS[args.method]) if args.method in methods.METHODS else ():
        if field.default is dataclasses.MISSING and field.name in DEFAULTS:
            options.setdefault(field.name, DEFAULTS[field.name])
    if args.inflection is not None:
        options["r"] = (options.get("r", DEFAULTS["r"]), args.inflection)
    try:
        methods.create(args.method, options)
    except (ValueError, TypeError) as error:
        raise UserError(error) from None
    return options


def text(options: dict) -> str:
    """Options as a reader writes them: r=13, keep_rate=0.7."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _integers(text: str) -> int | list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or a list such as 16,16,8, got {text!r}") from None
    return values[0] if len(values) == 1 else values


def _numbers(text: str) -> float | list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or a list such as 0.9,0.7,0.5, got {text!r}") from None
    return values[0] if len(values) == 1 else values


def _blocks(text: str) -> tuple[int, ...]:
    values = _integers(text)
    return tuple(values) if isinstance(values, list) else (values,)
