"""Record which patches methods keep, merge and drop on folders of photographs, and report how they compare."""

import argparse
from pathlib import Path

import torch

from . import arguments, compare, network, table
from .errors import UserError

BATCH = 16
EXAMPLES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folder",
        nargs="*",
        metavar="FOLDER",
        help="data sets: images, or a folder for each class (default: two photos)",
    )
    add(
        "--model",
        action="append",
        metavar="MODEL",
        help="a timm VisionTransformer; may be given again (default: none, only report)",
    )
    add("--method", default=compare.ALL, metavar="METHOD,...", help="reduction methods (default: every one)")
    add("--keep-rate", type=arguments.numbers, metavar="RATE,...", help="default: .9,.7,.5,.25")
    blocks = {"type": arguments.integer_list, "metavar": "BLOCK,..."}
    add(
        "--stages",
        **blocks,
        help="the blocks that reduce, from 0 (default: a quarter, half, three quarters of the way)",
    )
    add("--features", **blocks, help="the blocks whose class token is kept (default: those, and the last)")
    network.add_arguments(parser)
    add("--batch-size", type=arguments.at_least_one, default=BATCH, help="images a call (default: %(default)s)")
    add("--no-report", action="store_true", help="only record, such as in one of several processes")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--threads", type=arguments.at_least_one, help="CPU threads (default: as torch chooses)")
    add(
        "--examples",
        type=arguments.at_least_one,
        default=EXAMPLES,
        help="photographs in the report (default: %(default)s)",
    )
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="records and report; a stopped run goes on")


def run(args: argparse.Namespace) -> int:
    network.need("analyze", "timm", "rich", "PIL", "numpy", "scipy", "matplotlib", "jinja2")
    from . import recording, reporting  # not above: they import SciPy

    device = arguments.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.model and (args.folder or args.no_report):
        raise UserError("folders are recorded with a model: name a --model, or no folder to report on what is there")
    left_out = {}
    with table.progress() as progress:
        try:
            if args.model:
                left_out = recording.record(args, device, progress)
            page = None if args.no_report else reporting.write(args.output, args.examples, progress)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of GPU memory, lower --batch-size ({error})") from None
        except OSError as error:
            raise UserError(f"cannot write {args.output}: {error}") from None
    for what, why in left_out.items():
        print(f"{what} was left out: {why}")
    files = sorted(args.output.glob(f"*/*{recording.SUFFIX}"))
    print(f"{args.output}: {len(files)} records, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    if page:
        print(f"{page}: the report, beside its figures/ and tables/")
    return 0
