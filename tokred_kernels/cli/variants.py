"""The variants of a model that are compared: dense, reduced, its plain PyTorch forms and its oracles.

build     makes them over one set of weights
tokens    counts what the reduced one keeps
verify    compares their results; nothing is timed before this
measure   times them side by side
rows      turns times into images/s, speed-up and reduction efficiency
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import apply, schedule, trace, use_backend
from ..methods import TopK
from ..models.baselines import oracle_model, plain_model, shared_copy
from . import agreement
from .timing import Timing, graphed, interleave

# A whole model amplifies one near-tie that falls the other way; this tells such noise from a wrong integration.
LEAST_COSINE = {torch.float32: 0.99, torch.float16: 0.95, torch.bfloat16: 0.9}


def build(model: nn.Module, method: str, **options) -> dict[str, nn.Module]:
    """The variants by name, over the weights of `model`.

    Args:
        model: a timm VisionTransformer in eval mode, which becomes the variant "dense".
        method, options: as `tokred_kernels.apply` takes them; it raises what it refuses.
    """
    reduced = apply(shared_copy(model), method, **options)
    chosen = reduced.tokred_method
    counts = schedule.tokens(reduced)
    variants = {
        "dense": model,
        method: reduced,
        "oracle": oracle_model(model, counts),
        "oracle_self": oracle_model(model, counts, attention="tokred"),
    }
    removed = chosen.schedule(len(counts), model.patch_embed.num_patches)[: len(counts)]
    selection = {"scores": chosen.scores, "fuse": chosen.fusion} if isinstance(chosen, TopK) else {}
    # The plain form of ToMe merges once a block.
    once = (
        method != "tome" or schedule.merged(removed, model.patch_embed.num_patches, model.num_prefix_tokens) == counts
    )
    with contextlib.suppress(ValueError):  # a method or head without a plain form: the table does without
        for attention in ("sdpa", "explicit") if once else ():
            variants[f"plain_{attention}"] = plain_model(
                model, removed, method=method, attention=attention, **selection
            )
    return variants


def tokens(reduced: nn.Module, pixels: Tensor) -> list[float]:
    """Tokens that enter the first block of a patched model and that leave each block, the mean over the images."""
    with trace(reduced) as traced:
        reduced(pixels)
    return traced.counts.double().mean(0).tolist()


def verify(variants: dict[str, nn.Module], method: str, pixels: Tensor, batch_size: int) -> dict:
    """Every op call against the specification, and the logits of the variants against each other."""

    def logits(name: str) -> Tensor:
        return torch.cat([variants[name](part) for part in pixels.split(batch_size)])

    with agreement.StepChecker() as checker:
        reduced = logits(method)
    with use_backend("reference"):
        cosines = {"reference": agreement.cosine(reduced, logits(method))}
    if "plain_explicit" in variants:
        cosines["plain"] = agreement.cosine(reduced, logits("plain_explicit"))
    dense = logits("dense")
    check = checker.check
    return {
        "passed": check.passed(pixels.dtype) and min(cosines.values()) >= LEAST_COSINE[pixels.dtype],
        "steps": check.steps,
        "tokens": check.tokens,
        "near_ties": check.near_ties,
        "wrong": check.wrong,
        "step_error": check.error,
        "attention_error": check.attention,
        "cosine_with": cosines,
        "dense": {
            "images": len(pixels),
            "same_top1": agreement.same_top1(reduced, dense),
            "cosine": agreement.cosine(reduced, dense),
        },
    }


def measure(
    variants: dict[str, nn.Module],
    batch: Tensor,
    *,
    rounds: int,
    max_seconds: float = float("inf"),
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times a forward of each variant on the batch: interleaved; on a GPU, replays of a CUDA graph."""

    def call(model: nn.Module) -> Callable[[], object]:
        def forward():
            return model(batch)

        return graphed(forward) if batch.is_cuda else forward

    calls = {name: call(model) for name, model in variants.items()}
    return interleave(calls, batch.device.type, rounds=rounds, max_seconds=max_seconds, on_round=on_round)


def rows(timings: dict[str, Timing], method: str, batch_size: int) -> dict[str, dict]:
    """Figures of each variant. Reduction efficiency RE = time of an oracle / time of the variant."""

    def efficiency(oracle: str, name: str) -> float | None:
        reduces = name == method or name.startswith("plain")
        return timings[oracle].over(timings[name]) if reduces and oracle in timings else None

    return {
        name: {
            "seconds_min": timing.best,
            "seconds_median": timing.median,
            "rounds": len(timing.seconds),
            "images_per_second": batch_size / timing.median,
            "speedup": timings["dense"].over(timing),
            "re_sdpa": efficiency("oracle", name),
            "re_self": efficiency("oracle_self", name),
        }
        for name, timing in timings.items()
    }
