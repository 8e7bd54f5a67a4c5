"""Models x methods x keep rates x data sets into records; an image is read once for all methods of a model.

A run that was stopped goes on where it stopped: with the same batch size its records end up the same, byte for byte.
"""

import argparse
import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import methods
from ..analysis.record import HEADER_BYTES, Header, Writer, read_header
from . import compare, datasets, network, table
from .errors import UserError

LIST = "images.json"
SUFFIX = ".record"
DENSE = "dense"
RESERVED = ("figures", "tables")  # folders of the report


class Setting(NamedTuple):
    """A patched model that shares its weights with the others, and the header of its record but for the data set."""

    model: nn.Module
    header: dict


def chosen_methods(text: str) -> list[str]:
    """The methods of --method.

    Raises:
        UserError: an unknown one, or one twice.
    """
    names = list(methods.METHODS) if text == compare.ALL else text.split(",")
    for name in names:
        if name not in methods.METHODS:
            raise UserError(f"unknown method {name!r}; there is {', '.join(methods.METHODS)}")
        if names.count(name) > 1:
            raise UserError(f"method {name} is given twice")
    return names


def record(args: argparse.Namespace, device: str, progress: table.Stages) -> dict[str, str]:
    """Brings the records of every model, method, keep rate and data set up to date; what was left out, and why.

    Raises:
        UserError: bad input, or records of something else in the way.
    """
    names, rates = chosen_methods(args.method), compare.keep_rates(args)
    sets = datasets.find(args.folder)
    for dataset in sets:
        if dataset.name in RESERVED:
            raise UserError(f"a data set must not be named {dataset.name}: rename the folder")
    built, left_out = [], {}
    for name in dict.fromkeys(args.model):
        progress.stage(f"{name}: building")
        model = network.create(argparse.Namespace(**{**vars(args), "model": name})).to(device)
        built.append((name, model, _settings(args, name, model, names, rates, left_out)))
    for dataset in sets:
        folder = args.output / dataset.name
        folder.mkdir(parents=True, exist_ok=True)
        settled = datasets.settle(dataset, folder / LIST, _recorded(folder))
        for name, model, found in built:
            progress.stage(f"{name}, {dataset.name}", len(found) * len(settled.files))
            _run(found, settled, args, model, device, progress)
    return left_out


def _settings(
    args: argparse.Namespace, name: str, model: nn.Module, names: Sequence[str], rates: Sequence[float], left_out: dict
) -> list[Setting]:
    """The dense model and every method at every rate; `left_out` gets the methods that the model refuses."""
    from .. import apply
    from ..models.baselines import shared_copy

    try:
        dense = apply(shared_copy(model), "tome", r=0)  # runs timm's own forward
    except (ValueError, AttributeError) as error:
        raise UserError(error) from None
    depth = len(model.blocks)
    stages = args.stages or [depth * quarter // 4 for quarter in (1, 2, 3)]
    if not all(0 <= stage < depth for stage in stages):
        raise UserError(f"stages must be below {depth}, the number of blocks, got {stages}")
    features = args.features or sorted({*(depth * quarter // 4 for quarter in (1, 2, 3)), depth - 1})
    if not all(0 <= block < depth for block in features):
        raise UserError(f"--features must be below {depth}, the number of blocks, got {features}")
    common = {
        "model": name,
        "weights": network.weights(args),
        "depth": depth,
        "grid": list(model.patch_embed.grid_size),
        "prefix": model.num_prefix_tokens,
        "feature_blocks": features if model.has_class_token else [],
        "width": model.embed_dim,
    }
    weights = fingerprint(model.named_parameters())
    found = [Setting(dense, {**common, **of_method(dense, DENSE, None, {}, weights)})]
    for method in names:
        for rate in rates:
            options = compare.options(method, model, rate, stages)
            torch.manual_seed(args.seed)
            try:
                reduced = apply(shared_copy(model), method, **options)
            except ValueError as error:
                if args.method != compare.ALL:
                    raise UserError(error) from None
                left_out[f"{name}, {method}"] = str(error)
                break
            found.append(Setting(reduced, {**common, **of_method(reduced, method, rate, options, weights)}))
    return found


def of_method(model: nn.Module, method: str, rate: float | None, options: dict, weights: str) -> dict:
    """The fields of a header that the method decides."""
    removed = model.tokred_method.schedule(len(model.blocks), model.patch_embed.num_patches)
    parts = [(name, p) for name, p in model.named_parameters() if "tokred_part" in name]
    return {
        "method": method,
        "keep_rate": rate,
        "options": options,
        "untrained": bool(parts),
        "fingerprint": weights + fingerprint(parts) if parts else weights,
        "blocks": [block for block, r in enumerate(removed[: len(model.blocks)]) if r > 0],
    }


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Of named parameters, as a header has it."""
    digest = hashlib.blake2b(digest_size=8)
    for name, p in parameters:
        digest.update(name.encode())
        digest.update(p.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _run(
    settings: Sequence[Setting],
    dataset: datasets.Dataset,
    args: argparse.Namespace,
    model: nn.Module,
    device: str,
    progress: table.Stages,
) -> None:
    """Every image that some record of the data set still lacks through the models of those records."""
    import timm.data

    from ..analysis.observed import observe

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    labels = dataset.labels_for(model.num_classes)
    count = len(dataset.files)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_writer(args.output, dataset.name, setting)) for setting in settings]
        for writer in writers:
            progress.advance(writer.count)
        for batch in _batches(count, args.batch_size):
            lacking = [pair for pair in zip(settings, writers, strict=True) if pair[1].count < batch.stop]
            if not lacking:
                continue
            pixels, digests = dataset.load(batch, transform)
            pixels = pixels.to(device)
            for setting, writer in lacking:
                header, start = setting.header, writer.count - batch.start
                found = observe(setting.model, pixels, header["blocks"], header["feature_blocks"])
                rows = (digests, labels[batch.start : batch.stop], found.top1, found.pattern, found.feature)
                writer.append(*(values[start:] for values in rows))
                progress.advance(len(batch) - start)


def _writer(folder: Path, dataset: str, setting: Setting) -> Writer:
    header = Header(dataset=dataset, **setting.header)
    rate = "" if header.keep_rate is None else f".{header.keep_rate:g}"
    path = folder / dataset / f"{header.model.replace('/', '_')}.{header.method}{rate}{SUFFIX}"
    try:
        return Writer(path, header)
    except BlockingIOError:
        raise UserError(f"another process records {path}") from None
    except (ValueError, OSError) as error:
        raise UserError(error) from None


def _recorded(folder: Path) -> int:
    """The images of the longest record in a folder."""
    try:
        sizes = [(path.stat().st_size, read_header(path).row.itemsize) for path in folder.glob(f"*{SUFFIX}")]
    except ValueError as error:
        raise UserError(error) from None
    return max(((size - HEADER_BYTES) // row for size, row in sizes), default=0)


def _batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
