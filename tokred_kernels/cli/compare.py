"""Every method of the registry in one model at several keep rates: what `tokred bench --method all` measures."""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import methods
from . import method_options, table
from .errors import UserError

ALL = "all"
KEEP_RATES = (0.9, 0.7, 0.5, 0.25)  # of "Which Tokens to Use?"


def keep_rates(args: argparse.Namespace) -> list[float]:
    """The rates to compare at.

    Raises:
        UserError: a rate outside (0, 1], or an option of a single method.
    """
    for name in ("r", "inflection", "tokens", "option"):
        if getattr(args, name, None):
            raise UserError(f"--method {ALL} takes --keep-rate and --stages, not --{name}")
    given = KEEP_RATES if args.keep_rate is None else args.keep_rate
    rates = [given] if isinstance(given, float) else list(given)
    for rate in rates:
        if not 0 < rate <= 1:
            raise UserError(f"keep_rate must be in (0, 1], got {rate}")
    return rates


def options(method: str, model: nn.Module, keep_rate: float, stages: Sequence[int]) -> dict:
    """Options with which a method keeps floor(keep_rate^(i + 1) P) patches in stage i, or as close as it gets."""
    from .. import schedule

    fields = method_options.fields(method)
    if "keep_rate" in fields:
        found = {"keep_rate": keep_rate, "stages": tuple(stages)}
        if "rule" in fields:
            found["rule"] = "wttu"
    else:
        share = schedule.ratios(keep_rate, len(stages), "wttu")
        left = goal = model.patch_embed.num_patches
        removed = []
        for r in schedule.unkept(len(model.blocks), left, stages, share, rule="wttu"):
            goal -= r
            removed.append(min(left - goal, left // 2))  # at most half of a block's patches merge: the next goes on
            left -= removed[-1]
        found = {"r": removed}
    if "scores" in fields and not model.has_class_token:
        found["scores"] = "mean"
    return found


def measure(
    model: nn.Module,
    pixels: Tensor,
    batch: Tensor,
    rates: Sequence[float],
    stages: Sequence[int] | None,
    progress: table.Stages,
    *,
    rounds: int,
    max_seconds: float,
    seed: int = 0,
) -> dict:
    """What a record holds beyond the setting: the rows of the table, by keep rate, then in the order of the registry.

    Args:
        pixels: the photographs that results are checked on; batch: the images of one timed call.
        stages: the blocks that reduce; None: after a quarter, half and three quarters of the blocks.
        rounds, max_seconds: of the timing at each keep rate.
        seed: of the learned parts, which stay random.

    Raises:
        UserError: a model that no method can run in, or a stage beyond its blocks.
    """
    from .. import schedule

    try:
        dense_macs = schedule.macs(model)
    except (ValueError, AttributeError) as error:
        raise UserError(error) from None
    depth = len(model.blocks)
    stages = stages or [depth * quarter // 4 for quarter in (1, 2, 3)]
    if not all(0 <= stage < depth for stage in stages):
        raise UserError(f"stages must be below {depth}, the number of blocks, got {stages}")
    rows = []
    for rate in rates:
        progress.stage(f"checking, keep rate {rate:g}", len(methods.METHODS))
        found = _checked(model, pixels, len(batch), rate, stages, seed, progress.advance)
        progress.stage(f"timing, keep rate {rate:g}", rounds)
        _time(model, batch, found, rounds, max_seconds, progress.advance)
        rows += [row for row, _ in found]
    if all("refused" in row for row in rows):
        raise UserError(rows[0]["refused"])
    for row in rows:
        if "macs" in row:
            row["ideal_speedup"] = dense_macs / row["macs"]
    return {
        "stages": list(stages),
        "prefix": model.num_prefix_tokens,
        "macs": {"dense": dense_macs},
        "rows": rows,
        "agreement": {"passed": all(row["agreement"]["passed"] for row in rows if "agreement" in row)},
    }


def _checked(
    model: nn.Module,
    pixels: Tensor,
    batch_size: int,
    rate: float,
    stages: Sequence[int],
    seed: int,
    on_method: Callable[[], object],
) -> list[tuple[dict, nn.Module | None]]:
    """A row and the patched model of each method, compared with the reference; None for what is not to be timed."""
    from .. import apply, schedule
    from ..models.baselines import shared_copy
    from . import variants

    found = []
    for method in methods.METHODS:
        row = {"method": method, "keep_rate": rate, "options": options(method, model, rate, stages)}
        try:
            torch.manual_seed(seed)
            reduced = apply(shared_copy(model), method, **row["options"])
        except ValueError as error:
            row["refused"], reduced = str(error), None
        else:
            tokens = variants.tokens(reduced, pixels)
            row["untrained"] = any(len(list(b.tokred_part.parameters())) for b in reduced.blocks if b.tokred_part)
            row["tokens"] = tokens
            row["macs"] = schedule.macs(reduced)
            row["agreement"] = variants.verify({"dense": model, method: reduced}, method, pixels, batch_size)
            if not row["agreement"]["passed"]:
                reduced = None
        found.append((row, reduced))
        on_method()
    return found


def _time(
    model: nn.Module,
    batch: Tensor,
    found: list[tuple[dict, nn.Module | None]],
    rounds: int,
    max_seconds: float,
    on_round: Callable[[], object],
) -> None:
    """Adds to each row its time and that of its oracle, all of them interleaved, with one oracle for equal counts."""
    from .. import schedule
    from ..models.baselines import oracle_model
    from . import variants

    candidates, oracles = {"dense": model}, {}
    for row, reduced in found:
        if reduced is not None:
            counts = tuple(schedule.tokens(reduced))
            oracles[row["method"]] = counts
            candidates[row["method"]] = reduced
            if counts not in candidates:
                candidates[counts] = oracle_model(model, counts)
    timings = variants.measure(candidates, batch, rounds=rounds, max_seconds=max_seconds, on_round=on_round)
    for row, reduced in found:
        if reduced is not None:
            dense, timing, oracle = (timings[name] for name in ("dense", row["method"], oracles[row["method"]]))
            row["seconds_min"] = timing.best
            row["seconds_median"] = timing.median
            row["rounds"] = len(timing.seconds)
            row["images_per_second"] = len(batch) / timing.median
            row["dense_images_per_second"] = len(batch) / dense.median
            row["oracle_images_per_second"] = len(batch) / oracle.median
            row["speedup"] = dense.over(timing)
            row["re_sdpa"] = oracle.over(timing)
            row["reduction_seconds"] = timing.median - oracle.median
