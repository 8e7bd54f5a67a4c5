"""Run a timm model dense and reduced on real images: verify, then time both, the plain form and the oracle."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from . import arguments, compare, images, machine, method_options, network, plot, table
from .errors import UserError, check_writable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Enough rounds for a stable minimum; a slow model stops after a minute, with three rounds at least.
ROUNDS, MAX_SECONDS = 15, 60.0
# Below about 16 images a small model on a GPU waits for its launches, whatever its number of tokens.
GPU_BATCH, CPU_BATCH_LIMIT = 64, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm VisionTransformer, such as deit_small_patch16_224")
    method_options.add_arguments(parser, f"; {compare.ALL}: a table of every one, at keep rates .9,.7,.5,.25")
    add("--image", nargs="+", default=[], metavar="PATH", help="image files or folders (default: two photographs)")
    add(
        "--batch-size",
        type=arguments.at_least_one,
        help=f"images a call (default: all of them, {CPU_BATCH_LIMIT} at most; {GPU_BATCH} on a GPU)",
    )
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="default: float32 on cpu, bfloat16 on cuda")
    add("--threads", type=arguments.at_least_one, help="CPU threads (default: as torch chooses)")
    add(
        "--rounds",
        type=arguments.at_least_one,
        help=f"timing rounds (default: {ROUNDS}, fewer after {MAX_SECONDS:.0f} s)",
    )
    network.add_arguments(parser)
    add("--json", type=Path, metavar="FILE", help="save the results")
    add("--plot", type=Path, metavar="FILE.png", help="save a picture of the results")


def run(args: argparse.Namespace) -> int:
    _check_files(args)
    device = arguments.device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")]
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # graphs, events and streams are those of the current device
    if args.threads:
        torch.set_num_threads(args.threads)
    with table.progress() as progress, torch.inference_mode():
        try:
            record = _measure(args, device, dtype, progress)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of GPU memory, lower --batch-size ({error})") from None
    every = args.method == compare.ALL
    (table.show_all if every else table.show)(record)
    try:
        if args.json:
            args.json.write_text(json.dumps(record, indent=2) + "\n")
        if args.plot and (every or "timing" in record):
            (plot.save_all if every else plot.save)(record, args.plot)
    except OSError as error:
        raise UserError(f"cannot save the results: {error}") from None
    return 0 if record["agreement"]["passed"] else 1


def _measure(args: argparse.Namespace, device: str, dtype: torch.dtype, progress: table.Stages) -> dict:
    """Builds, verifies and times; the record is what --json saves."""
    progress.stage("building the models")
    every = args.method == compare.ALL
    chosen = compare.keep_rates(args) if every else method_options.chosen(args)
    model = network.create(args)
    names, pixels = images.load(args.image, model)
    model, pixels = model.to(device, dtype), pixels.to(device, dtype)
    batch_size = args.batch_size or (GPU_BATCH if pixels.is_cuda else min(len(names), CPU_BATCH_LIMIT))
    batch = pixels[torch.arange(batch_size, device=pixels.device) % len(pixels)]
    limits = {"rounds": args.rounds or ROUNDS, "max_seconds": float("inf") if args.rounds else MAX_SECONDS}
    setting = {
        "model": args.model,
        "method": args.method,
        "weights": network.weights(args),
        "images": names,
        "image_size": list(pixels.shape[2:]),
        "batch_size": batch_size,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": {"versions": machine.versions(), "cpu": machine.cpu(), "gpus": machine.gpus()},
    }
    if every:
        found = compare.measure(model, pixels, batch, chosen, args.stages, progress, seed=args.seed, **limits)
    else:
        found = _measure_one(model, args.method, chosen, pixels, batch, progress, **limits)
    return {**setting, **found}


def _measure_one(
    model: torch.nn.Module,
    method: str,
    options: dict,
    pixels: Tensor,
    batch: Tensor,
    progress: table.Stages,
    *,
    rounds: int,
    max_seconds: float,
) -> dict:
    """What a record holds of one method beyond the setting."""
    from .. import schedule
    from . import variants  # not above: it imports timm

    try:
        found = variants.build(model, method, **options)
        macs = {"dense": schedule.macs(model), "reduced": schedule.macs(found[method])}
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(error) from None
    progress.stage("checking the results")
    record = {
        "options": options,
        "tokens": variants.tokens(found[method], pixels),
        "macs": macs,
        "ideal_speedup": macs["dense"] / macs["reduced"],
        "agreement": variants.verify(found, method, pixels, len(batch)),
    }
    if record["agreement"]["passed"]:
        progress.stage("timing", rounds)
        timings = variants.measure(found, batch, rounds=rounds, max_seconds=max_seconds, on_round=progress.advance)
        record["timing"] = variants.rows(timings, method, len(batch))
    return record


def _check_files(args: argparse.Namespace) -> None:
    """Before any work: results that could not be saved, and packages that are missing."""
    if args.json:
        check_writable(args.json)
    if args.plot:
        check_writable(args.plot, ".png")
    network.need("bench", "timm", "rich", "PIL", *["matplotlib"] * bool(args.plot))
