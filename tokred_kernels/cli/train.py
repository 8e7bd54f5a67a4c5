"""Train a timm model with token reduction: alone, or on many processes under torchrun.

torchrun --nproc-per-node=8 -m tokred_kernels train --model deit_small_patch16_224 --data imagenet --output run
"""

import argparse
import dataclasses
import os
from pathlib import Path

from ..training.settings import BadInput, Settings
from . import arguments, method_options, network
from .errors import UserError
from .watch import Show

# Settings that are no plain flag: what a method takes has flags of its own.
_OTHER = ("method", "options", "model_options", "exits")
_METHOD = ("method", *method_options.SHARED, "inflection", "option")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for field in dataclasses.fields(Settings):
        if field.name not in _OTHER:
            _add_setting(parser, field)
    add("--exits", type=arguments.integer_list, metavar="BLOCK,...", help="metr: exits (default: its stages)")
    add(
        "--model-option",
        type=method_options.pair,
        action="append",
        metavar="NAME=VALUE",
        help="an option of timm's model, such as img_size=384; may be given again",
    )
    method_options.add_arguments(parser, "; nothing: the dense model")
    add("--config", type=Path, metavar="FILE", help="YAML with any of these, keep_rate: 0.7; flags go before it")
    add("--resume", action="store_true", help="go on from last.pt, with its settings but for flags given now")
    # None is what was not said: flags go before a file, which goes before the defaults of Settings.
    parser.set_defaults(method=None, option=None, parser=parser)


def run(args: argparse.Namespace) -> int:
    network.need("train", "timm", "rich", "PIL", "yaml")
    from ..training import distributed, loop

    try:
        settings = _settings(args)
        settings.check()
        if settings.format in ("coco", "nuswide"):
            network.need("train", "sklearn")
        network.check(settings.model)
        world = distributed.start(settings.device)
    except (BadInput, UserError) as error:
        return refuse(error)
    try:
        with Show(world.first) as watch:
            loop.train(settings, world, resume=args.resume, watch=watch)
    except BadInput as error:
        return refuse(error)
    finally:
        distributed.stop()
    return 0


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = field.default
    text = field.metadata["help"]
    more: dict = {"default": None, "help": text.replace("%", "%%")}
    if isinstance(default, bool):
        more["action"] = argparse.BooleanOptionalAction
    else:
        more["type"] = type(default)
        more |= {name: field.metadata[name] for name in ("choices", "metavar") if name in field.metadata}
        if default != "":
            more["help"] += f" (default: {default})"
    parser.add_argument(flag, **more)


def _settings(args: argparse.Namespace) -> Settings:
    """Defaults, then the checkpoint's on --resume, then the file's, then the flags'."""
    layers = [_from_file(args.config, args.parser)] if args.config else []
    layers.append(_said(args))
    given: dict = {}
    for layer in layers:
        if "method" in layer:  # another method, with options of its own
            given = {name: value for name, value in given.items() if name not in _METHOD}
        given |= layer
    fields = {field.name: given[field.name] for field in dataclasses.fields(Settings) if field.name in given}
    fields.pop("method", None)
    if "exits" in given:
        fields["exits"] = tuple(given["exits"])
    if "model_option" in given:
        fields["model_options"] = dict(given["model_option"])
    if any(name in given for name in _METHOD):
        fields |= _method(given)
    return dataclasses.replace(_stored(fields) if args.resume else Settings(), **fields)


def _said(args: argparse.Namespace) -> dict:
    """What flags were given."""
    other = ("command", "config", "parser", "resume")
    return {name: value for name, value in vars(args).items() if value is not None and name not in other}


def _stored(fields: dict) -> Settings:
    """The settings of the training to resume."""
    from ..training import checkpoint

    if not fields.get("output"):
        raise UserError("--resume needs --output, the folder of the training")
    path = Path(fields["output"]) / "last.pt"
    found = checkpoint.load(path).get("settings")
    if not isinstance(found, dict) or set(found) != {field.name for field in dataclasses.fields(Settings)}:
        raise UserError(f"{path} is no checkpoint of tokred train")
    return Settings(**{**found, "exits": tuple(found["exits"])})


def _method(given: dict) -> dict:
    """The method and its options."""
    if "method" not in given:
        raise UserError("options of a method need --method")
    wanted = {**dict.fromkeys(_METHOD), "option": [], **{name: given[name] for name in _METHOD if name in given}}
    return {"method": given["method"], "options": method_options.chosen(argparse.Namespace(**wanted))}


def _from_file(path: Path, parser: argparse.ArgumentParser) -> dict:
    """What a YAML file says, checked as flags are."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"the configuration {path} must be a mapping of names to values")
    words = []
    for name, value in entries.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [f"{flag}={key}={entry}" for key, entry in value.items()]
        elif value is not None:
            words.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    try:
        return _said(parser.parse_args(words))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def refuse(error: Exception) -> int:
    """One line, by one of the processes that know of the error."""
    knows = getattr(error, "rank", None) or 0
    if int(os.environ.get("RANK", 0)) == knows:
        raise UserError(error) from None
    return 2
