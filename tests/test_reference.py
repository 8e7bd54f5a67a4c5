"""The specification against worked examples whose values were calculated by hand, and the fuzzer's first cases."""

import pytest
import torch
from fuzz import fuzz

import tokred_kernels as tokred
from tokred_kernels.reference import match_scores

KEYS = torch.tensor([(1, 0), (1, 2), (3, 1), (0, 1), (2, 2), (4, 1), (-1, 2), (3, -2)], dtype=torch.float32)
X = 10 * torch.arange(8, dtype=torch.float32)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    with tokred.use_backend(request.param):
        yield


def merged(r: int, prefix: int, T: int = 8):
    out, size, assign = tokred.match_merge(X[None, :T, None], KEYS[None, :T], r, prefix)
    return [round(v, 2) for v in out[0, :, 0].tolist()], size[0].tolist(), assign[0].tolist()


def test_scores():
    """a = tokens 2, 4, 6 and b = 1, 3, 5, 7 behind one prefix token."""
    want = [[0.7071, 0.3162, 0.9971, 0.6139], [0.9487, 0.7071, 0.8575, 0.1961], [0.6, 0.8944, -0.2169, -0.8682]]
    torch.testing.assert_close(match_scores(KEYS[None], 1)[0], torch.tensor(want), atol=5e-5, rtol=0)


@pytest.mark.usefixtures("backend")
class TestWorkedExample:
    def test_cls(self):
        assert merged(2, 1) == ([0, 60, 25, 30, 35, 70], [1, 1, 2, 1, 2, 1], [0, 2, 4, 3, 2, 4, 1, 5])

    def test_cls_with_r_clamped_to_3(self):
        assert merged(9, 1)[:2] == ([0, 25, 45, 35, 70], [1, 2, 2, 2, 1])

    def test_cls_and_distillation_token(self):
        assert merged(2, 2)[:2] == ([0, 10, 40, 45, 35, 70], [1, 1, 1, 2, 2, 1])

    def test_nothing_protected(self):
        """Two sources into one destination; the kept rows ascend, where the published code has score order."""
        assert merged(2, 0, T=7)[:2] == ([40, 60, 10, 30, 23.33], [1, 1, 1, 1, 3])

    def test_unmerge_gives_every_member_its_row(self):
        out, _, assign = tokred.match_merge(X[None, :, None], KEYS[None], 2)
        assert tokred.unmerge(out, assign)[0, :, 0].tolist() == [0, 25, 35, 30, 25, 35, 60, 70]


class TestWorkedExampleOfBothWays:
    """Three criteria: similarity, informativeness h (1 / column mean of the attention) and size."""

    X = torch.tensor([(1, 0, 1), (2, 1, 0), (0, 1, 1), (1, 3, 0), (2, 0, 1), (0, 2, 1), (3, 1, 1), (1, 1, 2)]).float()
    SIZE = torch.tensor([1.0, 1, 2, 1, 1, 3, 1, 1])
    MEAN = torch.tensor([0.1382, 0.1288, 0.1167, 0.1373, 0.1373, 0.1223, 0.1127, 0.1067])
    WEIGHT = (MEAN.min() / MEAN) ** (1 / 20) * (SIZE.min() / SIZE) ** (1 / 40)

    def test_scores(self):
        want = [[0.6379, 0.8072, 0.9212, 0.9129], [0.8804, 0.6255, 0.5725, 0.8543], [0.9602, 0.7741, 0.6767, 0.8669]]
        torch.testing.assert_close(
            match_scores(self.X[None], 1, self.WEIGHT[None])[0], torch.tensor(want), atol=1e-4, rtol=0
        )

    @pytest.mark.parametrize(
        "two_way, want",
        [(True, [0, 3, 1, 4, 2, 1, 3, 1]), (False, [0, 1, 3, 2, 1, 3, 1, 4])],
        ids=["two-way", "one-way"],
    )
    @pytest.mark.usefixtures("backend")
    def test_assign(self, two_way, want):
        assign = tokred.match(self.X[None], 3, 1, self.WEIGHT[None], two_way=two_way)
        assert assign[0].tolist() == want

    @pytest.mark.usefixtures("backend")
    def test_features(self):
        assign = tokred.match(self.X[None], 3, 1, self.WEIGHT[None], two_way=True)
        out, size = tokred.merge(self.X[None], assign, 5, self.SIZE[None], (self.MEAN * self.SIZE)[None])
        want = [(1, 0, 1), (0.1510, 1.5189, 1.1510), (2, 0, 1), (2.4668, 1, 0.4668), (1, 3, 0)]
        torch.testing.assert_close(out[0], torch.tensor(want), atol=2e-4, rtol=0)
        assert size[0].tolist() == [1, 6, 1, 2, 1]

    @pytest.mark.usefixtures("backend")
    def test_what_merged_into_a_patch_follows_it(self):
        """Token 2 into 1, the most alike pair, and then 1 into 0: all three in one row."""
        angle = torch.tensor([0.0, 0.5, 0.6, 2.0])
        metric = torch.stack([angle.cos(), angle.sin()], -1)[None]
        assert tokred.match(metric, 2, 0, two_way=True)[0].tolist() == [0, 0, 0, 1]


def test_the_first_cases_of_the_fuzzer():
    fuzz(2000, seed=20, report_every=0)
