"""Patterns of traced forwards, and the faults of published analysis code that they must not have."""

import numpy as np
import pytest
import torch
import vits

import tokred_kernels as tokred
from tokred_kernels import analysis


def traced(model: torch.nn.Module, x: torch.Tensor) -> tuple[tokred.trace, np.ndarray]:
    with torch.inference_mode(), tokred.trace(model) as t:
        model(x)
    return t, analysis.patterns(t.last, model.num_prefix_tokens)


@pytest.mark.parametrize("method", vits.METHODS)
def test_the_last_pattern_is_the_source_of_the_trace(method):
    model = vits.reduced(vits.tiny("deit"), method)
    t, pattern = traced(model, vits.images())
    assert pattern.shape == (2, 4, 36) and pattern.dtype == np.int16
    source, fused = t.source[:, 1:].numpy(), t.in_fused[:, 1:].numpy()
    np.testing.assert_array_equal(analysis.labels(pattern[:, -1]), source)
    np.testing.assert_array_equal(analysis.kept(pattern[:, -1]), (source >= 0) & ~fused)
    for index, left in enumerate(t.tokens[1:]):
        assert analysis.labels(pattern[:, index]).max() < left


@pytest.mark.parametrize("fuse", ["none", "sum"])
def test_ids_are_those_of_the_first_block_after_every_stage(fuse):
    """The published code composes relative ids itself: of a fused or dropped token, -1, indexing makes the last one."""
    model = vits.tiny("deit")
    keep = {0: 20, 1: 12, 3: 5}
    x = vits.images(6)
    _, want, clear = vits.selection_oracle(vits.tiny("deit").double(), x.double(), keep, fuse=fuse)
    assert clear
    method = "topk" if fuse == "none" else "evit"
    tokred.apply(model, method, tokens=list(keep.values()), stages=tuple(keep))
    t, pattern = traced(model, x)
    np.testing.assert_array_equal(analysis.labels(pattern[:, -1]), want[:, 1:])
    sets = analysis.kept(pattern)
    for earlier, later in zip(sets.swapaxes(0, 1), sets.swapaxes(0, 1)[1:], strict=False):
        np.testing.assert_array_equal(analysis.ioa(earlier, later), 1)  # who is kept late was kept early
    if fuse == "none":
        assert sets.sum(-1).tolist() == [[20, 12, 12, 5]] * 6
        relative = [assign[:, 1:].numpy() for assign in t.assign if assign is not None]
        wrong = np.take_along_axis(relative[1], relative[0] - 1, axis=1) >= 0  # -1 - 1 counts from the end
        assert (wrong != sets[:, 1]).any()


@pytest.mark.parametrize("metric", ["l1", "l2", "linf"])
def test_rings_of_recorded_patterns_are_whole(metric):
    """Distances in floating point split rings: the published code's 14 x 14 sets are no rings."""
    distance = {"l1": lambda a, b: abs(a) + abs(b), "l2": lambda a, b: a * a + b * b, "linf": np.maximum}[metric]
    a, b = np.abs(np.meshgrid(np.arange(-13, 14, 2), np.arange(-13, 14, 2), indexing="ij"))
    away = distance(a, b)
    counts = {"l1": [136, 84, 60], "l2": [140, 96, 68], "linf": [144, 100, 64]}[metric]
    model = vits.tiny("deit", img_size=112)
    tokred.apply(model, "radial", keep_rate=0.7, stages=(0, 1, 3), metric=metric)
    _, pattern = traced(model, vits.images(2, 112))
    for block, count in zip((0, 1, 3), counts, strict=True):
        sets = analysis.kept(pattern[:, block]).reshape(2, 14, 14)
        for one in sets:
            assert one.sum() == count
            assert away[one].max() < away[~one].min()
            np.testing.assert_array_equal(one, np.rot90(one))
            np.testing.assert_array_equal(one, one.T)


class TestDepths:
    def test_by_hand(self):
        """Patch 0 stays, 1 and 2 merge in block 3, 3 is dropped in block 6, 4 is fused there, alone."""
        pattern = np.array([[[1, 2, 2, 3, 4], [1, 2, 2, -1, -5]]])
        assert analysis.depths(pattern, [3, 6], 12).tolist() == [[12, 3, 3, 6, 6]]
        assert analysis.depths(pattern[:, :0], [], 12).tolist() == [[12] * 5]

    def test_every_block_or_those_that_reduce(self):
        model = tokred.apply(vits.tiny("deit"), "evit", tokens=[20, 12], stages=(1, 3))
        _, pattern = traced(model, vits.images(3))
        found = analysis.depths(pattern, range(4), 4)
        np.testing.assert_array_equal(found, analysis.depths(pattern[:, [1, 3]], [1, 3], 4))
        for image, depth in zip(pattern, found, strict=True):
            for patch in range(36):
                gone = [block for block in range(4) if image[block, patch] < 0]
                assert depth[patch] == (gone[0] if gone else 4)
        assert np.bincount(found.ravel()).tolist()[:3] == [0, 48, 0]  # later the fused token is a candidate too

    def test_refusals(self):
        pattern = np.zeros((1, 2, 5), int)
        with pytest.raises(ValueError, match=r"pattern must be \[B, 3, P\], got \[1, 2, 5\]"):
            analysis.depths(pattern, [1, 2, 3], 12)
        with pytest.raises(ValueError, match=r"ascending and below 4, got \[3, 4\]"):
            analysis.depths(pattern, [3, 4], 4)
        with pytest.raises(ValueError, match=r"ascending and below 4, got \[2, 1\]"):
            analysis.depths(pattern, [2, 1], 4)
