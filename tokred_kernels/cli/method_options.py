"""The options of the reduction methods on the command line, the same for every command."""

import argparse
import dataclasses

from .. import methods
from .errors import UserError

# What is removed where no option says it.
R, KEEP_RATE = 13, 0.7
OPTIONS = ("r", "keep_rate", "tokens", "stages", "rule", "scores", "fuse", "normalize")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --method and an argument for each option; `chosen` reads them."""
    add = parser.add_argument
    add("--method", default="tome", help=f"reduction method: {', '.join(methods.METHODS)} (default: %(default)s)")
    add("--r", type=_integers, help=f"tokens to remove in each block, or a list r,r,... (default: {R})")
    add("--inflection", type=float, help="slope of r over the blocks, -1 (most removed early) to 1 (late)")
    add(
        "--keep-rate",
        type=_numbers,
        metavar="RATE",
        help=f"share of the patches to keep in each stage, or a list rate,rate,... (default: {KEEP_RATE})",
    )
    add("--tokens", type=_list, metavar="K,K,...", help="instead: how many patches to keep in each stage or block")
    add("--stages", type=_list, metavar="BLOCK,...", help="the blocks that reduce, from 0 (default: the method's)")
    add("--rule", help="how rates become counts, evit or wttu (default: the method's)")
    add("--scores", help="cls, or mean for models without a class token (default: cls)")
    add("--no-fuse", dest="fuse", action="store_const", const=False, help="drop what the method would fuse")
    add("--normalize", action="store_const", const=True, help="divide the fused token by the sum of its scores")


def chosen(args: argparse.Namespace) -> dict:
    """The options for `tokred_kernels.apply(model, args.method, **options)`.

    Raises:
        UserError: an unknown method, or options that it does not take.
    """
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    method = methods.METHODS.get(args.method)
    known = [field.name for field in dataclasses.fields(method)] if method else []
    if "r" in known:
        options.setdefault("r", R)
    if "keep_rate" in known and "tokens" not in options:
        options.setdefault("keep_rate", KEEP_RATE)
    if args.inflection is not None:
        options["r"] = (options.get("r"), args.inflection)
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


def _list(text: str) -> list[int]:
    values = _integers(text)
    return values if isinstance(values, list) else [values]
