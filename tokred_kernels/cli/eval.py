"""Evaluate a model with token reduction on a data set: accuracy, true tokens, MACs, images/s, RE; torchrun too."""

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..training.settings import BadInput, Settings
from . import method_options, network
from .errors import UserError, check_writable
from .train import refuse
from .watch import Show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="MODEL", help="the folder of a `tokred train`, one of its checkpoints, or a timm model")
    add("--data", required=True, metavar="DIR", help="the folder of the data")
    add("--split", choices=("val", "train"), default="val", help="default: %(default)s")
    add(
        "--format",
        choices=("folder", "nabirds", "coco", "nuswide"),
        help="of the data (default: as trained, or folder)",
    )
    add("--ema", action="store_true", help="the averaged weights of the checkpoint")
    method_options.add_arguments(parser, "; nothing: as it was trained")
    parser.set_defaults(method=None)
    network.add_arguments(parser)
    add("--batch-size", type=int, default=64, help="images a forward (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    add("--device", default="", help="cpu or cuda (default: cuda where there is one)")
    add("--amp", action="store_true", help="automatic mixed precision, bfloat16")
    add("--strict-images", action="store_true", help="stop at an unreadable image instead of skipping it")
    add("--rounds", type=int, default=15, help="timing rounds; 0: no timing (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="save the results")


def run(args: argparse.Namespace) -> int:
    if args.json:
        check_writable(args.json)
    if args.batch_size < 1 or args.workers < 0 or args.rounds < 0:
        raise UserError("--batch-size must be at least 1, --workers and --rounds at least 0")
    network.need("eval", "timm", "rich", "PIL", "sklearn")
    from ..training import distributed

    try:
        world = distributed.start(args.device)
    except BadInput as error:
        return refuse(error)
    try:
        with Show(world.first) as watch:
            record = _measure(args, world, watch)
    except (BadInput, UserError) as error:
        return refuse(error)
    finally:
        distributed.stop()
    if world.first:
        _show(record)
        if args.json:
            args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _measure(args: argparse.Namespace, world, watch: Show) -> dict:
    from .. import schedule
    from ..training import build, data
    from ..training.evaluate import evaluate

    model, settings, classes = _load(args)
    split = data.read(args.data, settings.format, args.split)
    if len(split.classes) != model.num_classes or (classes and classes != split.classes):
        raise BadInput(f"the labels are out of range: {len(split.classes)} classes, the model has {model.num_classes}")
    model = model.to(world.device).eval()
    images = build.held_out(split, model)
    options = {"batch_size": args.batch_size, "workers": args.workers, "amp": args.amp, "strict": args.strict_images}
    patched = hasattr(model, "tokred_method")
    found = evaluate(model, images, world, watch=watch, count_tokens=patched, **options)
    record = {
        "model": settings.model,
        "source": args.source,
        "method": settings.method,
        "options": settings.options,
        "split": args.split,
        **found,
        "macs": schedule.macs(model),
        "dense_macs": schedule.macs(model, 0),
    }
    if args.rounds and world.first:
        pixels = [pixels for pixels, *_ in (images[i] for i in range(min(args.batch_size, len(images))))]
        batch = torch.stack([p for p in pixels if p is not None]).to(world.device)
        watch.begin("timing", args.rounds)
        with torch.inference_mode(), torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
            record["timing"] = _timing(model, settings, batch, args.rounds, watch)
    world.wait()
    return record


def _load(args: argparse.Namespace) -> tuple[nn.Module, Settings, list[str] | None]:
    """The model as asked for, the settings that describe it, and the names of its classes, if they are known."""
    from .. import apply
    from ..training import build, checkpoint

    path = Path(args.source)
    state: dict = {}
    if path.exists():
        path = path / "last.pt" if path.is_dir() else path
        state = checkpoint.load(path)
        if not {"settings", "classes", "model"} <= state.keys():
            raise UserError(f"{path} is no checkpoint of tokred train")
        plain = {"init": "", "pretrained": False}
        settings = Settings(**{**state["settings"], **plain, "exits": ()})
    else:
        network.check(args.source)
        settings = Settings(model=args.source, pretrained=args.pretrained, seed=args.seed)
    if args.method is not None:
        settings = dataclasses.replace(settings, method=args.method, options=method_options.chosen(args))
    if args.format is not None:
        settings = dataclasses.replace(settings, format=args.format)
    model = build.dense_model(settings, len(state["classes"]) if state else None)
    try:
        if settings.method is not None:
            apply(model, settings.method, **settings.options)
    except (ValueError, TypeError) as error:
        raise UserError(error) from None
    if state:
        weights = state["ema" if args.ema else "model"]
        if weights is None:
            raise UserError(f"{path} holds no averaged weights")
        checkpoint.load_weights(model, weights, path)
    return model, settings, state.get("classes")


def _timing(model: nn.Module, settings: Settings, batch: Tensor, rounds: int, watch: Show) -> dict:
    """Figures of the dense model, the reduced one and its oracle, side by side."""
    from .. import remove, schedule
    from ..models.baselines import oracle_model
    from . import variants

    dense = remove(copy.deepcopy(model))
    found = {"dense": dense}
    if settings.method is not None:
        found |= {settings.method: model, "oracle": oracle_model(dense, schedule.tokens(model))}
    timings = variants.measure(found, batch, rounds=rounds, on_round=watch.advance)
    return variants.rows(timings, settings.method, len(batch))


def _show(record: dict) -> None:
    method = record["method"]
    said = f"{method} {method_options.text(record['options'])}" if method else "dense"
    print(f"{record['model']}, {said}: {record['images']} images of {record['split']}, {record['skipped']} skipped")
    print(", ".join(f"{name} {record[name]:.2f} %" for name in ("top1", "top5", "mAP") if name in record))
    if "tokens" in record:
        print(f"tokens {record['tokens'][0]:.4g} -> {record['tokens'][-1]:.4g}, the mean over the images")
    print(f"GMACs an image {record['dense_macs'] / 1e9:.3f} -> {record['macs'] / 1e9:.3f}")
    for name, row in record.get("timing", {}).items():
        efficiency = "" if row["re_sdpa"] is None else f", RE {row['re_sdpa']:.3f}"
        print(f"{name}: {row['images_per_second']:.4g} images/s, {row['speedup']:.2f}x{efficiency}")
