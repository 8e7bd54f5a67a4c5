"""Draw on photographs which patches a method drops, merges and fuses, block by block, as one PNG."""

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..trace import Forward, trace
from . import images, method_options, network
from .errors import UserError, check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="*", metavar="IMAGE", help="image files or folders (default: two photographs)")
    add("--model", required=True, metavar="MODEL", help="a timm VisionTransformer, such as deit_small_patch16_224")
    method_options.add_arguments(parser)
    network.add_arguments(parser)
    add("-o", "--output", type=Path, required=True, metavar="FILE.png", help="the picture; its blocks count from 0")


def run(args: argparse.Namespace) -> int:
    check_writable(args.output, ".png")
    network.need("visualize", "timm", "PIL", "numpy")
    options = method_options.chosen(args)
    model = network.create(args)
    names, pixels = images.load(args.image, model)
    from .. import apply, draw

    try:
        apply(model, args.method, **options)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(error) from None
    heading = f"{args.model}, {args.method} {method_options.text(options)}, {network.weights(args)} weights"

    grid = model.patch_embed.dynamic_feat_size(pixels.shape[2:])
    rows, marks = [], set()
    for name, one, photograph in zip(names, pixels, images.photographs(pixels, model), strict=True):
        with torch.inference_mode(), trace(model) as traced:
            model(one[None])
        steps = _steps(traced.last, model.num_prefix_tokens)
        if not steps:
            raise UserError(f"nothing to draw: every block keeps its {traced.tokens[0]} tokens ({heading})")
        sources, fused = [step.source.numpy() for step in steps], [step.fused for step in steps]
        titles = [Path(name).name, *(f"block {step.block}" for step in steps), "what is left"]
        counts = [traced.tokens[0], *(step.tokens for step in steps), steps[-1].tokens]
        drawn = zip(draw.panels(photograph, sources, grid, fused), titles, counts, strict=True)
        rows.append([draw.Titled(panel, title, f"{count} tokens") for panel, title, count in drawn])
        marks = marks.union(*map(draw.marks, sources, fused))

    png = io.BytesIO()
    draw.sheet(rows, heading, marks).save(png, "PNG", optimize=True)
    try:
        args.output.write_bytes(png.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error}") from None
    print(f"{args.output}: {', '.join(names)}; {heading}")
    if not args.pretrained:
        print("The weights are random: the picture shows how the method works, not what a trained model would choose.")
    return 0


class _Step(NamedTuple):
    """The patches after a block that reduced them."""

    block: int
    tokens: int
    source: Tensor  # [P], as draw.panels takes it
    fused: set[int]


def _steps(forward: Forward, prefix: int) -> list[_Step]:
    """The blocks of a traced forward of one image that left fewer tokens than they got."""
    steps = []
    for block, (source, fused) in enumerate(forward.steps()):
        before, left = forward.tokens[block : block + 2]
        if left < before:
            source, fused = source[0, prefix:], fused[0, prefix:]
            steps.append(_Step(block, left, source, set(source[fused].tolist()) - {-1}))
    return steps
