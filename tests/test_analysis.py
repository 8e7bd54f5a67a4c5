"""tokred_kernels.analysis: worked by hand, against other libraries, and under what must not change a metric."""

import itertools
import math

import numpy as np
import pytest
from scipy import linalg, spatial, stats
from sklearn import metrics

from tokred_kernels import analysis

RNG = np.random.default_rng(7)
STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _each_test_its_own_numbers():
    RNG.bit_generator.state = STATE


def mask(text: str) -> np.ndarray:
    return np.array([c == "x" for c in text])


def rotation(n: int) -> np.ndarray:
    return np.linalg.qr(RNG.standard_normal((n, n)))[0]


SETS = [
    ("xx..", "xx..", 1, 1),
    ("xxx.", ".xx.", 2 / 3, 1),
    (".xx.", "xxx.", 2 / 3, 2 / 3),
    ("xx..", "..xx", 0, 0),
    ("....", "....", 0, 0),
    ("xxxx", "....", 0, 0),
]


class TestSets:
    @pytest.mark.parametrize(("a", "b", "iou", "ioa"), SETS)
    def test_by_hand(self, a, b, iou, ioa):
        assert analysis.iou(mask(a), mask(b)) == pytest.approx(iou)
        assert analysis.ioa(mask(a), mask(b)) == pytest.approx(ioa)

    def test_order_of_patches_is_irrelevant_and_a_subset_has_ioa_1(self):
        a, b = RNG.random((2, 50, 196)) < 0.3
        order = RNG.permutation(196)
        np.testing.assert_array_equal(analysis.iou(a, b), analysis.iou(a[:, order], b[:, order]))
        np.testing.assert_array_equal(analysis.iou(a, b), analysis.iou(b, a))
        np.testing.assert_array_equal(analysis.ioa(a, a & b), 1)

    @pytest.mark.parametrize("P", [1, 63, 64, 65, 196, 256])
    def test_bits_hold_the_set(self, P):
        sets = RNG.random((3, 5, P)) < 0.5
        packed = analysis.pack(sets)
        assert packed.shape == (3, 5, -(-P // 64)) and packed.dtype == np.uint64
        bits = packed[..., np.arange(P) // 64] >> (np.arange(P) % 64).astype(np.uint64) & np.uint64(1)
        np.testing.assert_array_equal(bits.astype(bool), sets)
        np.testing.assert_array_equal(np.bitwise_count(packed).sum(-1), sets.sum(-1))

    def test_all_pairs_at_once_are_the_pairs_one_by_one(self, monkeypatch):
        monkeypatch.setattr("tokred_kernels.analysis.sets._IMAGES", 7)  # several parts, the last not full
        sets = RNG.random((6, 17, 81)) < RNG.random((6, 1, 1))
        sets[4] = False
        found = analysis.pairwise_iou(analysis.pack(sets))
        for i, j in itertools.product(range(6), repeat=2):
            assert found[i, j] == pytest.approx(analysis.iou(sets[i], sets[j]).mean(), abs=1e-15)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"iou: .* same images and grid, got \[3, 4\] and \[2, 4\]"):
            analysis.iou(np.ones((3, 4), bool), np.ones((2, 4), bool))
        with pytest.raises(ValueError, match=r"ioa: a kept set must be bool \[..., P\], got int64 \[4\]"):
            analysis.ioa(np.ones(4, bool), np.ones(4, np.int64))
        with pytest.raises(ValueError, match=r"pairwise_iou: .* got bool \[2, 3, 4\]"):
            analysis.pairwise_iou(np.ones((2, 3, 4), bool))
        with pytest.raises(ValueError, match="B of at least 1"):
            analysis.pairwise_iou(np.ones((2, 0, 4), np.uint64))


class TestClusterings:
    def test_by_hand(self):
        """Halves against quarters: a quarter lies within a half, knowing the half leaves one bit of two open."""
        found = analysis.clusterings(np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2, 3, 3]))
        assert found == pytest.approx((1, 0.5, 2 / 3))

    def test_clusters_that_say_nothing_of_each_other(self):
        assert analysis.clusterings(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx((0, 0, 0))

    def test_one_cluster(self):
        """0 / 0 is 1, as in scikit-learn: what has no information is homogeneous."""
        one, each = np.zeros(9, int), np.arange(9)
        assert analysis.clusterings(one, one) == (1, 1, 1)
        assert analysis.clusterings(one, each) == (1, 0, 0)
        assert analysis.clusterings(each, each) == pytest.approx((1, 1, 1))

    def test_are_those_of_scikit_learn_image_by_image(self):
        a, b = RNG.integers(0, 30, (40, 196)), RNG.integers(0, 5, (40, 196))
        b[:10] = a[:10] // 7
        b[11] = 3
        found = analysis.clusterings(a, b)
        want = [metrics.homogeneity_completeness_v_measure(*pair) for pair in zip(a, b, strict=True)]
        np.testing.assert_allclose(np.stack(found, 1), want, rtol=0, atol=1e-12)

    def test_numbers_of_clusters_and_order_of_patches_are_irrelevant(self):
        a, b = RNG.integers(0, 20, (2, 6, 100))
        order, names = RNG.permutation(100), RNG.permutation(20) * 1000
        want = analysis.clusterings(a, b)
        np.testing.assert_allclose(analysis.clusterings(names[a[:, order]], b[:, order]), want, atol=1e-12)
        np.testing.assert_allclose(analysis.clusterings(b, a), [want[1], want[0], want[2]], atol=1e-12)
        np.testing.assert_allclose(analysis.clusterings(a, names[a]), 1, atol=1e-12)

    def test_refusals(self):
        with pytest.raises(ValueError, match="a patch was dropped"):
            analysis.clusterings(np.array([0, -1]), np.array([0, 0]))
        with pytest.raises(ValueError, match=r"one shape \[..., P\] = \[2\], got int64 \[3\]"):
            analysis.clusterings(np.array([0, 1]), np.array([0, 1, 2]))
        with pytest.raises(ValueError, match=r"got float64 \[2\]"):
            analysis.clusterings(np.array([0, 1]), np.array([0.0, 1.0]))


MEASURES = {
    "linear_cka": analysis.linear_cka,
    "procrustes": analysis.procrustes,
    "mean cca": lambda x, y: analysis.cca(x, y).mean(),
    "pwcca": analysis.pwcca,
}


class TestFeatures:
    # Orthogonal, centred columns of norm 2.
    E1, E2, E3 = (np.array(c, float)[:, None] for c in ([1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]))

    def test_cka_by_hand(self):
        """|X^T Y|^2 = 16 of |X^T X| |Y^T Y| = sqrt(32) 4: one of two equal directions is shared."""
        assert analysis.linear_cka(np.hstack([self.E1, self.E2]), self.E1) == pytest.approx(1 / math.sqrt(2))
        assert analysis.linear_cka(self.E1, self.E2) == pytest.approx(0, abs=1e-15)

    def test_procrustes_by_hand(self):
        """Normalised, X^T Y is (1 / sqrt(2), 0)^T: its nuclear norm is 1 / sqrt(2)."""
        assert analysis.procrustes(np.hstack([self.E1, self.E2]), self.E1) == pytest.approx(2 - math.sqrt(2))
        assert analysis.procrustes(self.E1, self.E2) == pytest.approx(2)

    def test_cca_and_pwcca_by_hand(self):
        """x is e1 and, three times as long, e2; y is e1 alone, then halfway between e2 and a direction x lacks."""
        base = RNG.standard_normal((12, 5))
        base = np.linalg.qr(base - base.mean(0))[0]
        x = base[:, :2] * (1, 3)
        y = np.stack([base[:, 0], base[:, 1] + base[:, 2]], 1)
        np.testing.assert_allclose(analysis.cca(x, y), [1, 1 / math.sqrt(2)])
        assert analysis.pwcca(x, y) == pytest.approx((1 + 3 / math.sqrt(2)) / 4)

    def test_procrustes_is_what_is_left_after_scipys_rotation(self):
        x, y = RNG.standard_normal((2, 30, 6))
        x, y = (z - z.mean(0) for z in (x, y))
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        turn, _ = linalg.orthogonal_procrustes(x, y)
        assert analysis.procrustes(x, y) == pytest.approx(np.linalg.norm(x @ turn - y) ** 2)

    def test_canonical_correlations_are_cosines_of_the_angles_between_the_spaces(self):
        x, y = RNG.standard_normal((60, 7)), RNG.standard_normal((60, 4))
        x[:, 6] = x[:, 5]  # a rank less than columns
        want = np.cos(linalg.subspace_angles(x[:, :6] - x[:, :6].mean(0), y - y.mean(0)))[::-1]
        np.testing.assert_allclose(analysis.cca(x, y), np.sort(want)[::-1], atol=1e-12)

    @pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
    def test_identity_rotation_scale_shift_and_order_of_images(self, measure):
        x, y = RNG.standard_normal((40, 6)) * (1, 2, 3, 4, 5, 6), RNG.standard_normal((40, 6))
        order = RNG.permutation(40)
        want = measure(x, y)
        same = 0 if measure is analysis.procrustes else 1
        assert measure(x, x) == pytest.approx(same, abs=1e-12)
        assert measure(x, 3 * x @ rotation(6) + 5) == pytest.approx(same, abs=1e-12)
        assert measure(x, 3 * y @ rotation(6) + 5) == pytest.approx(want, abs=1e-12)
        if measure is not analysis.pwcca:
            assert measure(y, x) == pytest.approx(want, abs=1e-12)
            assert measure(x @ rotation(6), y) == pytest.approx(want, abs=1e-12)
        assert measure(x[order], y[order]) == pytest.approx(want, abs=1e-12)
        assert abs(measure(x, y[order]) - want) > 1e-3

    def test_any_linear_map_of_y_leaves_cca(self):
        x, y, linear = (RNG.standard_normal(shape) for shape in ((40, 6), (40, 5), (5, 5)))
        np.testing.assert_allclose(analysis.cca(x, y @ linear), analysis.cca(x, y), atol=1e-10)
        assert analysis.pwcca(x, y @ linear) == pytest.approx(analysis.pwcca(x, y))

    def test_a_part_of_the_images_at_a_time(self, monkeypatch):
        x, y = RNG.standard_normal((40, 6)) + 3, RNG.standard_normal((40, 5))
        want = [measure(x, y) for measure in MEASURES.values()]
        monkeypatch.setattr("tokred_kernels.analysis.features._IMAGES", 7)
        assert [measure(x, y) for measure in MEASURES.values()] == pytest.approx(want, abs=1e-12)
        x, y = analysis.Centred(x), analysis.Centred(y)
        assert [measure(x, y) for measure in MEASURES.values()] == pytest.approx(want, abs=1e-12)

    def test_models_of_different_width(self):
        x = RNG.standard_normal((50, 4))
        wide = np.hstack([x, np.zeros((50, 3))]) @ rotation(7)
        assert analysis.linear_cka(x, wide) == pytest.approx(1)
        assert analysis.procrustes(x, wide) == pytest.approx(0, abs=1e-12)
        np.testing.assert_allclose(analysis.cca(x, wide), np.ones(4))

    def test_refusals(self):
        x = RNG.standard_normal((9, 4))
        with pytest.raises(ValueError, match="linear_cka: x and y must be of the same images, got 9 and 8"):
            analysis.linear_cka(x, x[:8])
        with pytest.raises(ValueError, match=r"cca: needs more images than x and y have ranks together, got 9 and 9"):
            analysis.cca(x, RNG.standard_normal((9, 5)))
        with pytest.raises(ValueError, match="procrustes: the features are the same for every image"):
            analysis.procrustes(x, np.full((9, 4), 0.1))
        with pytest.raises(ValueError, match="finite"):
            analysis.pwcca(x, np.full((9, 4), np.nan))


SAME = {"kl": 0, "js": 0, "pearson": 1, "spearman": 1, "emd": 0, "sim": 1}


class TestMaps:
    P, Q = np.array([[1.0, 1], [2, 4]]), np.array([[2.0, 2], [2, 2]])

    def test_by_hand(self):
        """p = 1/8, 1/8, 1/4, 1/2 and q uniform: KL is 2 log 2 less the entropy 7/4 log 2, and so on."""
        log2 = math.log(2)
        assert analysis.kl(self.P, self.Q) == pytest.approx(log2 / 4)
        m = (np.array([1, 1, 2, 4]) / 8 + 0.25) / 2
        both = (7 / 4 * log2, 2 * log2)
        assert analysis.js(self.P, self.Q) == pytest.approx(-(m * np.log(m)).sum() - sum(both) / 2)
        # A quarter is too much at the lower right; an eighth is missing in both upper corners, 1 and sqrt(2) away.
        assert analysis.emd(self.P, self.Q) == pytest.approx((1 + math.sqrt(2)) / 8)
        # p stretched: 0, 0, 1/4, 3/4.
        assert analysis.sim(self.P, self.Q) == pytest.approx(1 / 2)
        assert analysis.pearson(self.P, [[1, 2], [3, 4]]) == pytest.approx(5 / math.sqrt(5 * 6))
        assert analysis.spearman(self.P, [[1, 2], [3, 4]]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))

    def test_one_patch_against_another_is_their_distance(self):
        p, q = np.zeros((2, 5, 7))
        p[0, 1], q[4, 4] = 3, 8
        assert analysis.emd(p, q) == pytest.approx(5)
        assert analysis.kl(p, q) == math.inf
        assert analysis.js(p, q) == pytest.approx(math.log(2))
        assert analysis.sim(p, q) == 0

    def test_emd_is_scipys(self):
        p, q = RNG.random((2, 4, 6))
        at = np.argwhere(np.ones((4, 6)))
        want = stats.wasserstein_distance_nd(at, at, p.ravel() / p.sum(), q.ravel() / q.sum())
        assert analysis.emd(p, q) == pytest.approx(want)
        assert analysis.emd(p, q) <= spatial.distance.pdist(at).max()

    @pytest.mark.parametrize("name", SAME)
    def test_identity_scale_and_turned_grids(self, name):
        measure = getattr(analysis, name)
        p, q = RNG.random((2, 6, 6)) + 0.1
        want = measure(p, q)
        assert measure(p, p) == pytest.approx(SAME[name], abs=1e-12)
        assert measure(p, 3 * p) == pytest.approx(SAME[name], abs=1e-12)
        assert measure(5 * p, q) == pytest.approx(want)
        assert measure(np.rot90(p), np.rot90(q)) == pytest.approx(want)
        assert measure(p.T, q.T) == pytest.approx(want)
        if name != "kl":
            assert measure(q, p) == pytest.approx(want)
        if name != "emd":  # the others do not know where patches are
            order = RNG.permutation(36)
            assert measure(p.ravel()[order], q.ravel()[order]) == pytest.approx(want)

    def test_equal_maps_have_no_divergence_whatever_rounding_says(self):
        for p in RNG.random((200, 6, 6)):
            for measure in (analysis.kl, analysis.js):
                assert 0 <= measure(p, 3 * p) < 1e-15

    def test_js_is_scipys(self):
        p, q = RNG.random((2, 30))
        assert analysis.js(p, q) == pytest.approx(spatial.distance.jensenshannon(p, q) ** 2)

    def test_constant_maps(self):
        assert math.isnan(analysis.pearson(self.P, self.Q)) and math.isnan(analysis.spearman(self.P, self.Q))
        assert analysis.sim(self.Q, self.Q) == pytest.approx(1)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"kl: maps must be of one grid, got \[2, 2\] and \[2, 3\]"):
            analysis.kl(self.P, np.ones((2, 3)))
        with pytest.raises(ValueError, match=r"emd: maps must be \[rows, columns\], got \[4\]"):
            analysis.emd(self.P.ravel(), self.Q.ravel())
        with pytest.raises(ValueError, match="js: a map of zeros is no distribution"):
            analysis.js(self.P, np.zeros((2, 2)))
        with pytest.raises(ValueError, match="sim: maps must be finite, at least 0"):
            analysis.sim(self.P, -self.P)


class TestProxy:
    def test_by_hand(self):
        """Ranks 1 2 3 4 against 1 3 2 4: one of six pairs is out of order."""
        found = analysis.proxy([0.1, 0.2, 0.3, 0.9], [-5, 0, -1, 2])
        assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
        assert found.kendall == pytest.approx((5 - 1) / 6)

    def test_only_order_counts(self):
        x, y = RNG.standard_normal((2, 12))
        order = RNG.permutation(12)
        want = analysis.proxy(x, y)
        assert analysis.proxy(np.exp(x), y**3) == pytest.approx(want)
        assert analysis.proxy(x[order], y[order]) == pytest.approx(want)
        assert analysis.proxy(x, -y).kendall == pytest.approx(-want.kendall)
        assert analysis.proxy(x, x)[::2] == pytest.approx((1, 1))

    def test_constant_and_refused(self):
        assert all(map(math.isnan, analysis.proxy([1, 1, 1], [1, 2, 3])))
        with pytest.raises(ValueError, match=r"at least 3 pairs, got \[2\] and \[2\]"):
            analysis.proxy([1, 2], [1, 2])
        with pytest.raises(ValueError, match="finite"):
            analysis.proxy([1, 2, math.nan], [1, 2, 3])
