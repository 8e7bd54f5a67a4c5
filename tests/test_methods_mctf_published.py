"""MCTF: a worked example, the published token counts and MACs."""

import functools
from types import SimpleNamespace

import pytest
import timm
import torch

import tokred_kernels as tokred
from tokred_kernels.methods import create
from tokred_kernels.models._attention import attend
from tokred_kernels.reference import match_scores


class TestWorkedExample:
    X = torch.tensor([(1, 0, 1), (2, 1, 0), (0, 1, 1), (1, 3, 0), (2, 0, 1), (0, 2, 1), (3, 1, 1), (1, 1, 2)]).float()
    SIZE = torch.tensor([1.0, 1, 2, 1, 1, 3, 1, 1])
    LOGITS = torch.tensor(
        [
            [0, 2, 1, 0, 1, 0, 2, 1],
            [1, 0, 0, 2, 0, 1, 0, 0],
            [2, 1, 0, 0, 1, 0, 0, 1],
            [0, 1, 1, 0, 2, 0, 1, 0],
            [1, 0, 2, 1, 0, 0, 0, 2],
            [0, 0, 1, 1, 0, 2, 1, 0],
            [1, 2, 0, 0, 1, 1, 0, 0],
            [0, 1, 0, 2, 0, 1, 1, 0],
        ]
    ).float()

    def block(self):
        """Stands for a model's: two heads with these logits, and values that show the rows of A'."""
        q = torch.stack([self.LOGITS, self.LOGITS.T])[None]
        k = (torch.eye(8) * 8**0.5).expand(1, 2, 8, 8)
        return SimpleNamespace(
            tokred_prefix=1,
            projections=lambda: (lambda x: (q, k), lambda x: torch.eye(x.shape[1], 8).expand(1, 2, -1, -1)),
            heads=lambda q, k, v, size: attend(q, k, v, None),  # the example's A has no sizes
            branch=lambda y: y,
        )

    def run(self, monkeypatch, **options):
        q, k = self.block().projections()[0](None)
        mean = tokred.attention_scores(q, k, scores="mean")
        method = create("mctf", dict(r=3, **options))
        monkeypatch.setattr("tokred_kernels.methods.mctf.scores_alone", lambda q, k, size: mean)
        return mean, method, method._fused_attention(self.block(), self.X[None], self.SIZE[None], 3)

    def test_scores(self, monkeypatch):
        mean, method, _ = self.run(monkeypatch)
        want = torch.tensor([0.1382, 0.1288, 0.1167, 0.1373, 0.1373, 0.1223, 0.1127, 0.1067])
        torch.testing.assert_close(mean[0], want, rtol=0, atol=5e-5)
        w = match_scores(self.X[None], 1, method.weight(mean, self.SIZE[None]))[0]
        want = [[0.6379, 0.8072, 0.9212, 0.9129], [0.8804, 0.6255, 0.5725, 0.8543], [0.9602, 0.7741, 0.6767, 0.8669]]
        torch.testing.assert_close(w, torch.tensor(want), rtol=0, atol=5.1e-5)
        unprotected = match_scores(self.X[None], 0, method.weight(mean, self.SIZE[None]))[0, 0]
        torch.testing.assert_close(unprotected, torch.tensor([0.7982, 0.5964, 0.6278, 0.9210]), rtol=0, atol=5.1e-5)

    def test_both_ways(self, monkeypatch):
        _, _, (rows, x, size, assign) = self.run(monkeypatch)
        assert assign[0].tolist() == [0, 3, 1, 4, 2, 1, 3, 1] and size[0].tolist() == [1, 6, 1, 2, 1]
        want = [(1, 0, 1), (0.1510, 1.5189, 1.1510), (2, 0, 1), (2.4668, 1, 0.4668), (1, 3, 0)]
        torch.testing.assert_close(x[0], torch.tensor(want), rtol=0, atol=5e-5)
        want = torch.tensor([0.0386, 0.2482, 0.1048, 0.5699, 0.0386, 0, 0, 0])
        torch.testing.assert_close(rows[0, 0, 0], want, rtol=0, atol=5.1e-5)
        torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 5))

    def test_one_way(self, monkeypatch):
        _, _, (_, x, size, assign) = self.run(monkeypatch, bidirectional=False)
        assert assign[0].tolist() == [0, 1, 3, 2, 1, 3, 1, 4] and size[0].tolist() == [1, 3, 1, 5, 1]
        want = [(1, 0, 1), (2.2976, 0.6375, 0.6601), (1, 3, 0), (0, 1.6112, 1), (1, 1, 2)]
        torch.testing.assert_close(x[0], torch.tensor(want), rtol=0, atol=5e-5)

    @pytest.mark.parametrize("pooling", [0, 1, 3])
    def test_rows_of_the_fused_map(self, monkeypatch, pooling):
        """Of both heads, against the formula with M and A written out."""
        _, _, (rows, _, _, assign) = self.run(monkeypatch, pooling=pooling)
        A = torch.stack([self.LOGITS, self.LOGITS.T]).double().softmax(-1)
        M = torch.zeros(5, 8, dtype=torch.float64)
        M[assign[0].long(), torch.arange(8)] = 1
        w = {0: self.SIZE, 1: self.SIZE * A.mean((0, 1)), 3: torch.ones(8)}[pooling].double()
        want = torch.diag(1 / (M @ w)) @ M @ torch.diag(w) @ A @ M.T
        torch.testing.assert_close(rows[0, :, :, :5].double(), want, rtol=1e-6, atol=1e-6)


@functools.cache
def deit(name):
    with torch.device("meta"):
        return timm.create_model(f"deit_{name}_patch16_224")


@pytest.mark.parametrize(
    ("r", "trace"),
    [
        (16, [197, 197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21]),
        (20, [197, 197, 177, 157, 137, 117, 97, 77, 57, 37, 19, 10, 10]),
        (0.35, [197] * 4 + [129] * 3 + [85] * 3 + [56] * 3),
        ([0, 0.5, 3], [197, 197, 99, 96] + [96] * 9),
    ],
    ids=str,
)
def test_published_tokens(r, trace):
    for mode, sites in enumerate([(0, 0), (0, 1), (1, 1)]):
        counts = tokred.schedule.tokens(deit("tiny"), method="mctf", r=r, one_step_ahead=mode)
        assert counts == [(trace[n + sites[0]], trace[n + sites[1]]) for n in range(12)]


@pytest.mark.parametrize(
    ("name", "r", "want"), [("tiny", 16, 0.697), ("small", 16, 2.577), ("tiny", 0.35, 0.742), ("small", 0.35, 2.744)]
)
def test_published_macs(name, r, want):
    assert round(tokred.schedule.macs(deit(name), method="mctf", r=r) / 1e9, 3) == want
    dense = tokred.schedule.macs(deit(name))
    assert tokred.schedule.macs(deit(name), method="mctf", r=0) == dense
