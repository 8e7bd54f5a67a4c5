"""Schedules, token counts and MACs against methods' published traces and numbers."""

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from vits import images, reduced, tiny

import tokred_kernels as tokred
from tokred_kernels import schedule


@pytest.mark.parametrize(
    "r, counts",
    [
        (8, [8] * 12),
        ((8, -1), [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
        ((13, -1), [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
        ((16, -1), [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        ((16, 1), [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]),
        ((16, 0.5), [8, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24]),
        ((8, 0), [8] * 12),
        ([4, 3], [4, 3] + [0] * 10),
        ([], [0] * 12),
        (list(range(14)), list(range(14))),
        (-2, [-2] * 12),
    ],
    ids=str,
)
def test_removals(r, counts):
    assert list(schedule.removals(r, 12)) == counts


def test_removals_do_not_divide_by_zero_for_one_block():
    assert schedule.removals((8, -1), 1) == (8,)
    assert schedule.removals([], 1) == (0,)
    assert schedule.removals(8, 0) == ()


@given(st.integers(0, 500), st.floats(-1, 1), st.integers(1, 48))
def test_removals_stay_between_0_and_2_r(r, inflection, depth):
    counts = schedule.removals((r, inflection), depth)
    assert len(counts) == depth and all(0 <= c <= 2 * r for c in counts) and sum(counts) <= depth * r


def entering(counts):
    return [a for a, _ in counts] + [counts[-1][1]]


@pytest.mark.parametrize(
    "r, patches, depth, trace",
    [
        (8, 196, 12, list(range(197, 100, -8))),
        (13, 196, 12, list(range(197, 40, -13))),
        (16, 196, 12, [*range(197, 20, -16), 11]),
        ((8, -1), 196, 12, [197, 181, 167, 154, 143, 133, 125, 118, 113, 109, 107, 106, 106]),
        ((16, -1), 196, 12, [197, 165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10]),
        (-3, 196, 12, [197] * 13),
        (1000, 5, 4, [6, 4, 3, 2, 2]),
    ],
    ids=str,
)
def test_tokens_of_the_published_traces(r, patches, depth, trace):
    assert entering(schedule.merged(schedule.removals(r, depth), patches, 1)) == trace


def test_577_tokens_end_as_25():
    assert schedule.merged(schedule.removals(23, 24), 576, 1)[-1][1] == 25


@given(st.integers(0, 40), st.integers(0, 10), st.lists(st.integers(-2, 30), max_size=8))
def test_merged_clamps_as_the_op_does(patches, prefix, removed):
    n = patches + prefix
    for (attention, mlp), r in zip(schedule.merged(removed, patches, prefix), removed, strict=True):
        assert attention == n
        n = tokred.match(torch.zeros(1, n, 2), r, prefix).unique().numel() if n else 0
        assert mlp == n


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize(
    "name, r, published",
    [
        ("deit_tiny_patch16_224", 0, 1.254),
        ("deit_small_patch16_224", 0, 4.599),
        ("deit_base_patch16_224", 0, 17.56),
        ("vit_large_patch16_224", 0, 61.6),
        ("deit_small_patch16_224", 13, 2.70),
        ("deit_small_patch16_224", 8, 3.42),
        ("deit_small_patch16_224", 16, 2.29),
        ("vit_large_patch16_224", 8, 30.96),
        ("vit_huge_patch14_224", 7, 92.8),
    ],
)
def test_macs_of_the_published_table(name, r, published):
    digits = len(str(published).partition(".")[2])
    model = meta(name)
    assert round(schedule.macs(model, r) / 1e9, digits) == published
    if r == 0:
        assert schedule.macs(model) == schedule.macs(model, 0)


@pytest.mark.parametrize(
    "options, published",
    [
        (dict(method="evit", keep_rate=0.7), 3.03),
        (dict(method="evit", keep_rate=0.5), 2.31),
        (dict(method="evit", keep_rate=0.7, fuse=False), 3.00),
        (dict(method="topk", keep_rate=0.9), 3.96),
        (dict(method="topk", keep_rate=0.7), 2.98),
        (dict(method="topk", keep_rate=0.5), 2.28),
        (dict(method="topk", keep_rate=0.25), 1.70),
        (dict(method="metr", tokens=[196, 179, 155, 126, 108, 97, 79, 65, 51, 36, 30, 2]), 2.3),
        (dict(method="metr", tokens=[196, 193, 175, 155, 140, 132, 120, 106, 87, 63, 55, 2]), 2.9),
    ],
    ids=str,
)
def test_macs_of_the_published_selections(options, published):
    digits = len(str(published).partition(".")[2])
    assert round(schedule.macs(meta("deit_small_patch16_224"), **options) / 1e9, digits) == published


@pytest.mark.parametrize(
    "rule, fuse, keep_rate, kept",
    [
        ("wttu", False, 0.9, [176, 158, 142]),
        ("wttu", False, 0.7, [137, 96, 67]),
        ("wttu", False, 0.5, [98, 49, 24]),
        ("wttu", False, 0.25, [49, 12, 3]),
        ("evit", False, 0.9, [177, 160, 144]),
        ("evit", False, 0.7, [138, 97, 68]),
        ("evit", False, 0.5, [98, 49, 25]),
        ("evit", False, 0.25, [49, 13, 4]),
        ("evit", True, 0.9, [177, 161, 146]),
        ("evit", True, 0.7, [138, 98, 70]),
        ("evit", True, 0.5, [98, 50, 26]),
        ("evit", True, 0.25, [49, 13, 4]),
        ("wttu", True, [0.9, 0.5, 0.25], [176, 98, 49]),
        ("evit", False, [0.5, 1, 0.5], [98, 98, 49]),
    ],
    ids=str,
)
def test_patches_kept_in_the_published_stages(rule, fuse, keep_rate, kept):
    removed = schedule.unkept(12, 196, (3, 6, 9), schedule.ratios(keep_rate, 3, rule), rule=rule, fuse=fuse)
    left = 196
    for block, r in enumerate(removed):
        if block in (3, 6, 9):
            assert left - r == kept[block // 3 - 1]
            left = left - r + (fuse and r > 0)
        else:
            assert r == 0


def test_rates_are_the_decimals_that_were_written():
    assert schedule.ratios(0.55, 1, "evit") == ((11, 20),)
    assert schedule.ratios(0.1 + 0.2, 2, "wttu") == ((3, 10), (9, 100))
    assert schedule.ratios([1, 0.5], 2, "wttu") == ((1, 1), (1, 2))
    assert schedule.unkept(1, 100, (0,), schedule.ratios(0.55, 1, "evit")) == (45,)  # ceil(0.55 * 100) is 56 in floats
    assert schedule.unkept(1, 100, (0,), schedule.ratios(0.29, 1, "wttu"), rule="wttu") == (71,)  # int(0.29 * 100): 28
    assert all(d <= 10**9 for _, d in schedule.ratios(0.123456789, 24, "wttu"))


@given(
    st.integers(0, 60),
    st.integers(0, 5),
    st.lists(st.integers(1, 70), min_size=1, max_size=6),
    st.booleans(),
)
def test_selected_counts_as_the_op_does(patches, prefix, counts, fuse):
    removed = schedule.unkept(len(counts), patches, range(len(counts)), None, counts, fuse=fuse)
    n = patches + prefix
    for (attention, mlp), r in zip(schedule.selected(removed, patches, prefix, fuse), removed, strict=True):
        assert attention == n
        score, k = torch.zeros(1, n), n - prefix - r
        out, assign = tokred.topk_gather(torch.zeros(1, n, 2), score, k, prefix, fuse="sum" if fuse else "none")
        n = out.shape[1]
        assert mlp == n and (r > 0) == bool((assign != torch.arange(assign.shape[1])).any() or (fuse and r == 1))


class CountMacs(torch.utils._python_dispatch.TorchDispatchMode):
    """The matrix products that actually run."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name in ("aten::addmm", "aten::mm"):
            a, b = args[-2:]
            self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        elif "attention" in name:
            (B, H, L, D), N = args[0].shape, args[1].shape[2]
            self.macs += 2 * B * H * L * N * D
        elif name == "aten::convolution":
            self.macs += out.numel() * args[1][0].numel()
        return out


@pytest.mark.parametrize("r", [0, 5, (6, -1)], ids=str)
@pytest.mark.parametrize(
    "name", ["deit", "distilled", "gap-reg4-nocls", "dinov2-swiglu", "siglip-map", "map-reg4", "prr-token", "no-pool"]
)
def test_macs_are_those_that_run(name, r):
    model = tokred.apply(tiny(name), "tome", r=r)
    with torch.no_grad(), CountMacs() as counted:
        model(images(1))
    assert schedule.macs(model) == counted.macs == schedule.macs(tiny(name), r)


@pytest.mark.parametrize("method", ["topk", "evit"])
@pytest.mark.parametrize("name", ["distilled", "map-reg4"])
def test_macs_of_a_selection_are_those_that_run(name, method):
    model = reduced(tiny(name), method, keep_rate=0.6, stages=(0, 2))
    with torch.no_grad(), CountMacs() as counted:
        model(images(1))
    options = dict(keep_rate=0.6, stages=(0, 2), scores=model.tokred_method.scores)
    assert schedule.macs(model) == counted.macs == schedule.macs(tiny(name), method=method, **options)


def test_tokens_of_a_patched_model_are_those_of_its_forward():
    model = tokred.apply(tiny("deit"), "tome", r=[5, 0, 40, 2, 9])
    with torch.no_grad(), tokred.trace(model) as t:
        model(images())
    assert entering(schedule.tokens(model)) == t.tokens
    assert schedule.tokens(model, 0) == schedule.tokens(tiny("deit")) == [(37, 37)] * 4


@pytest.mark.parametrize("inflection", [0.0, -1, 1])
@pytest.mark.parametrize("fraction", [1, 0.9, 0.6, 0.4])
def test_r_for_macs_is_the_smallest_within_the_budget(fraction, inflection):
    model = meta("deit_small_patch16_224")
    r = schedule.r_for_macs(model, fraction, inflection)
    assert schedule.macs(model, (r, inflection)) <= fraction * schedule.macs(model)
    assert r == 0 or schedule.macs(model, (r - 1, inflection)) > fraction * schedule.macs(model)


def test_r_for_macs_of_deit_small():
    assert schedule.r_for_macs(meta("deit_small_patch16_224"), 0.6) == 13


@pytest.mark.parametrize("fraction", [0, -1, 1.1, float("nan")])
def test_r_for_macs_refuses_a_fraction_outside_0_1(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got"):
        schedule.r_for_macs(tiny("deit"), fraction)


def test_r_for_macs_says_what_can_be_reached():
    with pytest.raises(ValueError, match=r"no r leaves 1\.0% of 0\.002 G MACs; the most, r = 36, leaves 4"):
        schedule.r_for_macs(tiny("deit"), 0.01)


@pytest.mark.parametrize(
    "options", [dict(), dict(method="topk"), dict(method="metr", stages=(2, 4), fuse=False)], ids=str
)
@pytest.mark.parametrize("fraction", [1, 0.8, 0.63])
def test_keep_rate_for_macs_is_the_largest_within_the_budget(fraction, options):
    model = meta("deit_small_patch16_224")
    rate = schedule.keep_rate_for_macs(model, fraction, **options)
    options = {"method": "evit", **options}
    assert schedule.macs(model, keep_rate=rate, **options) <= fraction * schedule.macs(model)
    assert rate == 1 or schedule.macs(model, keep_rate=rate + 0.001, **options) > fraction * schedule.macs(model)


def test_keep_rate_for_macs_of_deit_small():
    model = meta("deit_small_patch16_224")
    assert schedule.keep_rate_for_macs(model, 0.6) == 0.632
    assert schedule.keep_rate_for_macs(model, 1) == 1


def test_keep_rate_for_macs_says_what_can_be_reached():
    with pytest.raises(
        ValueError, match=r"no keep rate leaves 20\.0% of 4\.599 G MACs; the lowest, 0\.001, leaves 30\.1%"
    ):
        schedule.keep_rate_for_macs(meta("deit_small_patch16_224"), 0.2)
    with pytest.raises(ValueError, match=r"keep_rate_for_macs: fraction must be in \(0, 1\], got 0"):
        schedule.keep_rate_for_macs(tiny("deit"), 0)
    with pytest.raises(ValueError, match="evit: stages must be below 4, the number of blocks"):
        schedule.keep_rate_for_macs(tiny("deit"), 0.5)


def test_r_for_speed_is_the_smallest_r_that_reaches_the_speed():
    asked = []

    def measure(r):
        asked.append(r)
        return 100 + 10 * r

    assert schedule.r_for_speed(measure, 225, most=98) == 13
    assert len(asked) <= 8
    assert schedule.r_for_speed(measure, 50, most=98) == 0
    assert schedule.r_for_speed(measure, 100, most=0) == 0
    with pytest.raises(ValueError, match="no r reaches 2000 images/s; the most, r = 98, reaches 1080"):
        schedule.r_for_speed(measure, 2000, most=98)
    with pytest.raises(ValueError, match="most must be at least 0, got -1"):
        schedule.r_for_speed(measure, 1, most=-1)


def test_models_without_known_macs_are_refused():
    with pytest.raises(ValueError, match="must be a timm VisionTransformer, got Linear"):
        schedule.macs(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="MACs of HybridEmbed are not known"):
        schedule.macs(meta("vit_small_r26_s32_224"))


def test_a_schedule_may_be_asked_without_importing_timm():
    import subprocess
    import sys

    code = "import sys, tokred_kernels; tokred_kernels.schedule.removals(8, 12); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_schedules_do_not_change_the_model():
    model = tiny("deit")
    before = copy.deepcopy(model.state_dict())
    schedule.r_for_macs(model, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
