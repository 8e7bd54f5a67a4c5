"""The `tokred` command. Each module of a command's name adds its arguments and runs it; timm is imported only by runs.

Exit status: 0 done, 1 done and a check failed, 2 bad input (one line on stderr).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import analyze, bench, info, train, visualize
from . import eval as evaluate
from .errors import UserError

COMMANDS = {
    "info": info,
    "bench": bench,
    "visualize": visualize,
    "analyze": analyze,
    "train": train,
    "eval": evaluate,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = _Parser(prog="tokred", description="Token reduction for vision transformers, at no cost.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = command.__doc__.splitlines()[0]
        command.add_arguments(commands.add_parser(name, help=summary, description=summary))
    try:
        args = parser.parse_args(argv)
        return COMMANDS[args.command].run(args)
    except UserError as error:
        print(f"tokred: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
