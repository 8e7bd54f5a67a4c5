"""The options of the reduction methods on the command line, the same for every command.

The options that most methods share have flags of their own; any other field of a method's dataclass is --option.
"""

import argparse
import ast
import dataclasses

from .. import methods
from . import arguments
from .errors import UserError

SHARED = ("r", "keep_rate", "tokens", "stages")
# How much is removed where neither the options nor the method say it.
DEFAULTS = {"r": 13, "keep_rate": 0.7}


def add_arguments(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds --method, with more to say of it, and the arguments of its options; `chosen` reads them."""
    add = parser.add_argument
    names = ", ".join(methods.METHODS)
    add("--method", default="tome", help=f"reduction method: {names} (default: %(default)s){more}")
    add(
        "--r",
        type=arguments.integers,
        help=f"tokens to remove in each block, or a list r,r,... (default: {DEFAULTS['r']})",
    )
    add("--inflection", type=float, help="slope of r over the blocks, -1 (most removed early) to 1 (late)")
    add(
        "--keep-rate",
        type=arguments.numbers,
        metavar="RATE",
        help=f"share of the patches to keep in each stage, or a list rate,rate,... (default: {DEFAULTS['keep_rate']})",
    )
    add(
        "--tokens",
        type=arguments.integer_list,
        metavar="K,K,...",
        help="instead: how many patches to keep in each stage or block",
    )
    add(
        "--stages",
        type=arguments.integer_list,
        metavar="BLOCK,...",
        help="the blocks that reduce, from 0 (default: the method's)",
    )
    add(
        "--option",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of the method, such as scores=mean or fuse=False; may be given again",
    )
    takes = "; ".join(f"{name}: {', '.join(fields(name))}" for name in methods.METHODS)
    parser.epilog = f"options of each method, as in tokred_kernels.methods: {takes}"


def fields(method: str) -> list[str]:
    """The options of a method by name."""
    return [field.name for field in dataclasses.fields(methods.METHODS[method])]


def chosen(args: argparse.Namespace) -> dict:
    """The options for `tokred_kernels.apply(model, args.method, **options)`.

    Raises:
        UserError: an unknown method, options that it does not take, or one given twice.
    """
    options = {name: getattr(args, name) for name in SHARED if getattr(args, name) is not None}
    for name, value in args.option:
        if name in options:
            raise UserError(f"option {name} is given twice")
        options[name] = value
    if args.method in methods.METHODS:
        _fill(options, args.method)
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


def _fill(options: dict, method: str) -> None:
    """How much to remove, unless the options or the method say it."""
    given = {field.name: field.default for field in dataclasses.fields(methods.METHODS[method])}
    budgets = [name for name in ("r", "keep_rate", "tokens") if name in given]
    said = any(name in options or given[name] not in (None, dataclasses.MISSING) for name in budgets)
    if budgets and not said:
        options[budgets[0]] = DEFAULTS[budgets[0]]


def pair(text: str) -> tuple[str, object]:
    """NAME=VALUE; the value a number, True, False, None, a string, or a list or tuple of them."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # whatever is no literal is a string
        return name, value
