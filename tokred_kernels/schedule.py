"""How many tokens each block sees, what that costs, and which r or keep rate meets a budget.

removals((8, -1), 12)                 (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
unkept(12, 196, (3, 6, 9), ratios(0.7, 3, "evit"))     (0, 0, 0, 58, 0, 0, 41, ...): patches that blocks do not keep
tokens(model, r=13)                   [(197, 184), (184, 171), ...]: tokens in attention and in the MLP of each block
macs(model), macs(model, r=13)        multiply-accumulates of one image
macs(model, method="evit", keep_rate=0.7)
r_for_macs(model, 0.6)                the smallest r that leaves at most 60 % of the MACs
keep_rate_for_macs(model, 0.6)        the largest keep rate that leaves at most 60 % of the MACs
r_for_speed(measure, 1000.0, most=98) the smallest r that is measured to reach 1000 images/s
"""

import numbers
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

from torch import nn

Removal: TypeAlias = int | tuple[int, float] | list[int]
RULES = ("evit", "wttu")
SITES = ("before", "middle", "after")  # before a block, between its attention and its MLP, after it


def removals(r: Removal, depth: int) -> tuple[int, ...]:
    """Tokens to remove in each of `depth` blocks.

    Args:
        r: an int, the same for every block; (int, inflection), rising (inflection 1: from 0 to 2 r), constant (0) or
            falling (-1: from 2 r to 0) over the blocks by

                lo = trunc(r (1 - inflection)),  hi = 2 r - lo,  r_l = trunc(lo + (hi - lo) / (depth - 1) * l);

            or a list of ints, one a block, padded with 0; entries beyond the last block are kept and unused.
        depth: number of blocks. A model of one block removes r.

    Returns:
        The counts, not clamped to what a block can remove; a negative one removes nothing.

    Raises:
        ValueError: anything else, or an inflection outside [-1, 1].

    Source: Bolya et al., "Token Merging", ICLR 2023, section 4 (decreasing schedule).
    """
    r = plain(r)
    if isinstance(r, list):
        return (*r, *(0,) * (depth - len(r)))
    r, inflection = r if isinstance(r, tuple) else (r, 0.0)
    if depth == 1:
        return (r,)
    low = int(r * (1 - inflection))
    high = 2 * r - low
    step = (high - low) / (depth - 1)
    return tuple(int(low + step * block) for block in range(depth))


def plain(r: Removal) -> Removal:
    """r in Python's own numbers, as torch.compile wants it. Raises ValueError as `removals` does."""
    if isinstance(r, list):
        return [_integer(entry, r) for entry in r]
    if not isinstance(r, tuple):
        return _integer(r, r)
    if len(r) != 2:
        raise ValueError(f"r must be an int, (int, inflection) or a list of ints, got {r!r}")
    inflection = r[1]
    if isinstance(inflection, bool) or not isinstance(inflection, int | float) or not -1 <= inflection <= 1:
        raise ValueError(f"r: the inflection must be in [-1, 1], got {inflection!r}")
    return _integer(r[0], r), float(inflection)


def _integer(value: object, given: object) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"r must be an int, (int, inflection) or a list of ints, got {given!r}")


def merged(removed: Sequence[int], patches: int, prefix: int) -> list[tuple[int, int]]:
    """(tokens in attention, tokens in the MLP) of each block that merges `removed[l]` tokens between the two.

    At most half of a block's patches merge, as in `tokred_kernels.match`.
    """
    counts = []
    n = prefix + patches
    for r in removed:
        left = n - max(0, min(r, (n - prefix) // 2))
        counts.append((n, left))
        n = left
    return counts


def ratios(keep_rate: float | Sequence[float], stages: int, rule: str) -> tuple[tuple[int, int], ...]:
    """For each stage a fraction (numerator, denominator) for `unkept`, from a keep rate or one rate a stage.

    The fraction is exact: 0.55 is 11/20, not the binary number beside it, so that ceil(0.55 * 100) is 55 (in floats it
    is 56). Of what cannot be written with a denominator up to 1e9 it is the nearest that can: 0.1 + 0.2 is 3/10.

    Args:
        rule: "evit": of the patches that reach the stage. "wttu": of those that reach block 0, and a single rate k
            is k, k^2, k^3, ... over the stages.

    Raises:
        ValueError: a rate outside (0, 1], a list that has not one entry a stage, an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    single = isinstance(keep_rate, numbers.Real)
    rates = [keep_rate] * stages if single else list(keep_rate)
    if len(rates) != stages:
        raise ValueError(f"keep_rate must be a number or have one entry a stage, {stages}, got {keep_rate!r}")
    found = []
    for stage, rate in enumerate(rates):
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {keep_rate!r}")
        fraction = Fraction(str(rate)) ** (stage + 1 if single and rule == "wttu" else 1)
        found.append(fraction.limit_denominator(10**9).as_integer_ratio())
    return tuple(found)


def unkept(
    depth: int,
    patches: int,
    stages: Sequence[int],
    share: Sequence[tuple[int, int]] | None,
    counts: Sequence[int] | None = None,
    *,
    rule: str = "evit",
    fuse: bool = False,
) -> tuple[int, ...]:
    """Patches that each of `depth` blocks does not keep, for ints and SymInts.

        evit:    keep ceil(share * P), P the patches that reach the stage, an earlier fused token among them
        wttu:    keep max(1, floor(share * P0)), P0 the patches that reach block 0
        counts:  keep counts[i] in stage i

    A stage that would keep all of its patches leaves them alone, and fuses nothing.

    Args:
        patches: those that reach block 0.
        stages: the blocks that reduce, ascending.
        share: of `ratios`; None: counts are given.
        fuse: those not kept become one more patch.

    Source: Liang et al., "EViT", ICLR 2022; Haurum et al., "Which Tokens to Use?", ICCVW 2023.
    """
    removed = [0] * depth
    left = patches
    for index, block in enumerate(stages):
        if share is None:
            keep = counts[index]
        elif rule == "evit":
            keep = -(-left * share[index][0] // share[index][1])
        else:
            keep = max(1, patches * share[index][0] // share[index][1])
        removed[block] = left - min(left, keep)
        left = min(left, keep + int(fuse))
    return tuple(removed)


def selected(
    removed: Sequence[int], patches: int, prefix: int, fuse: bool, site: str = "middle"
) -> list[tuple[int, int]]:
    """(tokens in attention, tokens in the MLP) of each block, from the counts of `unkept` and a site of SITES."""
    counts = []
    n = prefix + patches
    for r in removed:
        left = n - r + int(fuse and r > 0)
        counts.append((left if site == "before" else n, n if site == "after" else left))
        n = left
    return counts


def tokens(
    model: nn.Module, r: Removal | float | None = None, *, method: str | None = None, **options
) -> list[tuple[int, int]]:
    """(tokens in attention, tokens in the MLP) of each block for one image of the model's input size.

    Args:
        model: a timm VisionTransformer, patched or not.
        r: the schedule of ToMe, or of `method`.
        method, options: another method, as `tokred_kernels.apply` takes it. Nothing: the model as it is, patched or
            dense.
    """
    return _counted(model, r, method, options)[0]


def macs(model: nn.Module, r: Removal | None = None, *, method: str | None = None, **options) -> int:
    """Multiply-accumulates of one image: what papers print as "FLOPs".

    A block of width C, N_a tokens in attention and N_m in the MLP costs 4 N_a C^2 + 2 N_a^2 C + 8 N_m C^2 (with timm's
    usual shapes), unless its method says otherwise; patch embedding, attention pooling and the classifier are added.
    Norms, softmax, activations, biases and the reduction itself are not counted.

    Args:
        model, r, method, options: as in `tokens`.

    Raises:
        ValueError: not a VisionTransformer, or one with a convolutional backbone before its tokens.
    """
    counts, of_block = _counted(model, r, method, options)
    total = _embedding_macs(model)
    for block, (n_attention, n_mlp) in zip(model.blocks, counts, strict=True):
        total += of_block(block, n_attention, n_mlp)
    return total + _head_macs(model, counts[-1][1] if counts else sum(_shape(model)[1:]))


def block_macs(block: nn.Module, n_attention: int, n_mlp: int) -> int:
    """Multiply-accumulates of a block whose attention sees n_attention tokens and its MLP n_mlp."""
    attn = block.attn
    projections = n_attention * (_linear_macs(attn.qkv) + _linear_macs(attn.proj))
    return projections + 2 * n_attention**2 * attn.num_heads * attn.head_dim + n_mlp * _linear_macs(block.mlp)


def r_for_macs(model: nn.Module, fraction: float, inflection: float = 0.0) -> int:
    """The smallest r with which ToMe leaves at most `fraction` of the dense model's MACs.

    Args:
        model: a timm VisionTransformer, patched or not.
        fraction: in (0, 1].
        inflection: of the schedule (r, inflection), see `removals`.

    Raises:
        ValueError: a fraction outside (0, 1], or one that no r reaches.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"r_for_macs: fraction must be in (0, 1], got {fraction}")
    dense = macs(model, 0)
    patches = _shape(model)[1]
    for r in range(patches + 1):
        cost = macs(model, (r, inflection))
        if cost <= fraction * dense:
            return r
    raise ValueError(
        f"r_for_macs: no r leaves {fraction:.1%} of {dense / 1e9:.3f} G MACs; the most, r = {patches}, leaves "
        f"{cost / dense:.1%}"
    )


def keep_rate_for_macs(model: nn.Module, fraction: float, method: str = "evit", **options) -> float:
    """The largest keep rate, in steps of 0.001, with which a method leaves at most `fraction` of the dense MACs.

    Found by bisection: the cost rises with the keep rate.

    Args:
        model: a timm VisionTransformer, patched or not.
        fraction: in (0, 1].
        method, options: as `tokred_kernels.apply` takes them, without keep_rate.

    Raises:
        ValueError: a fraction outside (0, 1], or one that no keep rate reaches.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"keep_rate_for_macs: fraction must be in (0, 1], got {fraction}")
    dense = macs(model, 0)

    def cost(step: int) -> int:
        return macs(model, method=method, keep_rate=step / 1000, **options)

    if cost(1) > fraction * dense:
        raise ValueError(
            f"keep_rate_for_macs: no keep rate leaves {fraction:.1%} of {dense / 1e9:.3f} G MACs; the lowest, 0.001, "
            f"leaves {cost(1) / dense:.1%}"
        )
    low, high = 1, 1000
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= fraction * dense:
            low = middle
        else:
            high = middle - 1
    return low / 1000


def r_for_speed(measure: Callable[[int], float], images_per_second: float, most: int) -> int:
    """The smallest r in [0, most] that reaches a speed, found by bisection with about log2(most) measurements.

    Args:
        measure: r to images/s, for example a warm, repeated run of `tokred.apply(copy.deepcopy(model), "tome", r=r)`.
            The speed is taken to rise with r, so the answer is as good as the measurement. Of a keep rate: with
            `keep_rate=1 - r / 100`, in percent.
        images_per_second: the speed to reach.
        most: the largest r to consider.

    Raises:
        ValueError: `most` is negative or does not reach the speed.
    """
    if most < 0:
        raise ValueError(f"r_for_speed: most must be at least 0, got {most}")
    fastest = measure(most)
    if fastest < images_per_second:
        raise ValueError(
            f"r_for_speed: no r reaches {images_per_second:g} images/s; the most, r = {most}, reaches {fastest:g}"
        )
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if measure(middle) >= images_per_second:
            high = middle
        else:
            low = middle + 1
    return high


def _counted(
    model: nn.Module, r: Removal | None, method: str | None, options: dict
) -> tuple[list[tuple[int, int]], Callable[[nn.Module, int, int], int]]:
    """What `tokens` returns, and the MACs of a block given its entry."""
    depth, patches, prefix = _shape(model)
    if method is not None:
        from . import methods  # they import this module

        chosen = methods.create(method, options if r is None else {"r": r, **options})
        chosen.check(model)
        return chosen.counts(depth, patches, prefix), chosen.macs
    if r is not None or not hasattr(model, "tokred_method"):
        return merged(removals(r or 0, depth)[:depth], patches, prefix), block_macs
    chosen = model.tokred_method
    return chosen.counts(model.tokred_depth, patches, prefix)[:depth], chosen.macs  # blocks may have been pruned


def _shape(model: nn.Module) -> tuple[int, int, int]:
    """Depth, patches and prefix tokens."""
    try:
        return len(model.blocks), model.patch_embed.num_patches, model.num_prefix_tokens
    except AttributeError:
        raise ValueError(f"schedule: model must be a timm VisionTransformer, got {type(model).__name__}") from None


def _linear_macs(module: nn.Module) -> int:
    """MACs of one token in all linear layers of a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _embedding_macs(model: nn.Module) -> int:
    embed = model.patch_embed
    if hasattr(embed, "backbone") or not isinstance(embed.proj, nn.Conv2d | nn.Linear):
        raise ValueError(f"schedule: the MACs of {type(embed).__name__} are not known")
    return embed.num_patches * embed.proj.weight.numel()


def _head_macs(model: nn.Module, n: int) -> int:
    """n tokens reach the pool."""
    total = 0
    pool = model.attn_pool
    patches = n if model.pool_include_prefix else n - model.num_prefix_tokens
    if hasattr(pool, "latent"):
        one_query = sum(_linear_macs(m) for m in (pool.q, pool.proj, pool.mlp) if m is not None)
        total += patches * _linear_macs(pool.kv) + pool.latent_len * (
            one_query + 2 * patches * pool.num_heads * pool.head_dim
        )
    elif pool is not None:
        total += 2 * patches**2 * pool.num_heads * pool.head_dim
    rows = 1 if model.global_pool else n
    return total + rows * sum(_linear_macs(getattr(model, name, nn.Identity())) for name in ("head", "head_dist"))
