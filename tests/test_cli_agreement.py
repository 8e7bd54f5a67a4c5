"""The check before any timing: wrong kernels are caught, and the judge of assignments is judged."""

import json

import pytest
import torch
from torch.library import Library

from tokred_kernels import reference, reference_clusters
from tokred_kernels.cli import agreement, main

MODEL = "test_vit"  # timm's smallest: 6 blocks of 100 patches, width 64


def _keeps_the_worst(x, branch, score, *args, **kwargs):
    return reference.add_topk_gather_norm(x, branch, -score, *args, **kwargs)


def _fuses_the_mean(*args, **kwargs):
    return reference.add_topk_gather_norm(*args, **{**kwargs, "fuse": "mean"})


def _forgets_the_norm(*args, **kwargs):
    out, assign, _ = reference.add_topk_gather_norm(*args, **kwargs)
    return out, assign, out.clone()


def _scores_late(q, k, v, size=None, *, scale=None, scores="none"):
    out, emitted = reference.attention(q, k, v, size, scale=scale, scores=scores)
    return out, emitted.roll(1, 1)


def _attends_flatly(q, k, v, size=None, *, scale=None, scores="none"):
    return reference.attention(q, k, v, size, scale=0.9 * q.shape[-1] ** -0.5, scores=scores)


@pytest.mark.parametrize(
    ("op", "bug", "caught"),
    [
        ("add_topk_gather_norm", _keeps_the_worst, "wrong"),
        ("add_topk_gather_norm", _fuses_the_mean, "step_error"),
        ("add_topk_gather_norm", _forgets_the_norm, "step_error"),
        ("attention", _scores_late, "attention_error"),
        ("attention", _attends_flatly, "attention_error"),
    ],
)
def test_wrong_kernel_of_a_selection_is_caught(op, bug, caught):
    import timm

    from tokred_kernels.cli import variants  # needs timm

    torch.manual_seed(0)
    found = variants.build(timm.create_model(MODEL).eval(), "evit", keep_rate=0.5, stages=(1, 3))
    pixels = torch.randn(1, 3, 160, 160)
    override = Library("tokred", "IMPL")
    override.impl(op, bug, "CPU", allow_override=True)
    try:
        with torch.inference_mode():
            checked = variants.verify(found, "evit", pixels, 1)
    finally:
        override._destroy()
    assert not checked["passed"] and checked[caught] > (1 if caught == "attention_error" else 1e-3)


def _matches_one_channel(metric, r, prefix=1, weight=None, *, power=1.0, two_way=False):
    return reference.match(metric[..., :1], r, prefix)


def _forgets_sizes(x, branch, assign, m, norm_weight, norm_bias, size, *of_branch, eps=1e-6):
    return reference.add_merge_norm(x, branch, assign, m, norm_weight, norm_bias, None, *of_branch, eps=eps)


@pytest.mark.parametrize(("op", "bug"), [("match", _matches_one_channel), ("add_merge_norm", _forgets_sizes)])
def test_wrong_kernel_is_caught_and_nothing_is_timed(op, bug, tmp_path, capsys):
    saved = tmp_path / "out.json"
    override = Library("tokred", "IMPL")
    override.impl(op, bug, "CPU", allow_override=True)
    try:
        status = main(["bench", MODEL, "--rounds", "1", "--device", "cpu", "--json", str(saved)])
    finally:
        override._destroy()
    assert status == 1
    assert "nothing was timed" in capsys.readouterr().out
    record = json.loads(saved.read_text())
    assert "timing" not in record
    assert record["agreement"]["wrong"] > 0


def _two_way_as_one_way(metric, r, prefix=1, weight=None, *, power=1.0, two_way=False):
    return reference.match(metric, r, prefix, weight, power=power)


def _forgets_the_weight(metric, r, prefix=1, weight=None, *, power=1.0, two_way=False):
    return reference.match(metric, r, prefix, power=power, two_way=two_way)


def _by_products(x, *, scale=1.0):
    """|x|^2 + |y|^2 - 2 x y cancels."""
    square = x.square().sum(2)
    return scale * (square[:, :, None] + square[:, None] - 2 * x @ x.mT).clamp(min=0).sqrt()


def _nearest_of_the_last(distance, centres, *, pin=False):
    return reference_clusters.nearest(distance, centres[:, 1:], pin=pin)


def _medoids_do_not_move(distance, label, centres, weight, *, update="textbook"):
    return centres.clone()


def _sees_one_too_few(distance, k):
    values, indices = reference_clusters.knn(distance, k)
    return values.roll(1, 2), indices


def _denser_or_equal(distance, density):
    return reference_clusters.separation(distance, -density)


class TestStepChecker:
    """Every op that it checks, right and with a planted bug."""

    def calls(self):
        generator = torch.Generator().manual_seed(0)
        x = 3 + torch.randn(2, 40, 16, generator=generator)
        weight = torch.rand(2, 40, generator=generator)
        distance = reference_clusters.pairwise_distance(x)
        centres = torch.arange(0, 40, 5, dtype=torch.int32).repeat(2, 1)
        label = reference_clusters.nearest(distance, centres)
        ops = torch.ops.tokred
        return {
            "match": lambda: ops.match(x, 9, 1, weight, power=1.0, two_way=True),
            "pairwise_distance": lambda: ops.pairwise_distance(x, scale=0.25),
            "knn": lambda: ops.knn(distance, 5),
            "separation": lambda: ops.separation(distance, weight),
            "nearest": lambda: ops.nearest(distance, centres, pin=True),
            "medoids": lambda: ops.medoids(distance, label, centres, weight),
        }

    @pytest.mark.parametrize(
        ("op", "bug"),
        [
            ("match", _two_way_as_one_way),
            ("match", _forgets_the_weight),
            ("pairwise_distance", _by_products),
            ("knn", _sees_one_too_few),
            ("separation", _denser_or_equal),
            ("nearest", _nearest_of_the_last),
            ("medoids", _medoids_do_not_move),
        ],
    )
    def test_passes_what_is_right_and_catches_what_is_wrong(self, op, bug):
        call = self.calls()[op]
        with agreement.StepChecker() as checker:
            call()
        assert checker.check.passed(torch.float32)
        override = Library("tokred", "IMPL")
        override.impl(op, bug, "CPU", allow_override=True)
        try:
            with agreement.StepChecker() as checker:
                call()
        finally:
            override._destroy()
        assert not checker.check.passed(torch.float32)

    def test_a_near_tie_excuses_its_image_in_both_directions(self):
        metric = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))
        assert not agreement.undecided(metric, 9).any()
        metric[1, 2::2] = metric[1, 2]  # any of a may go first
        assert agreement.undecided(metric, 9).tolist() == [False, True]


def test_cosine_of_equal_rows_is_one_also_of_zeros():
    zero, one = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert agreement.cosine(zero, zero) == agreement.cosine(one, one) == 1
    assert agreement.cosine(zero, one) == 0
    assert agreement.cosine(one, one.flip(0)) == 0


class TestWithinMargin:
    """The judge of assignments is judged."""

    @pytest.fixture(params=[0, 1, 2, 5], ids="p{}".format)
    def case(self, request):
        metric = torch.randn(3, 2, 40, 16, generator=torch.Generator().manual_seed(1))
        return metric, reference.match(metric, 7, request.param), request.param

    def test_accepts_the_reference(self, case):
        metric, assign, p = case
        assert agreement.within_margin(metric, assign, 7, p).all()

    def test_accepts_either_side_of_a_near_tie(self):
        # Sources 0 and 2 score 1 - 5e-9 and 1 - 2e-8 with their partners 1 and 3.
        metric = torch.tensor([[[1.0, 0.0], [1.0, 1e-4], [0.0, 1.0], [2e-4, 1.0]]])
        scores = reference.match_scores(metric.double(), 0)[0]
        assert 0 < (scores[0, 0] - scores[1, 1]).abs() < agreement.MARGIN
        for assign in ([1, 1, 0, 2], [0, 1, 2, 2]):
            assert agreement.within_margin(metric, torch.tensor([assign], dtype=torch.int32), 1, 0).all()

    def test_refuses_the_other_side_of_a_clear_gap(self):
        metric = torch.tensor([[[1.0, 0.0], [1.0, 1e-4], [0.0, 1.0], [2e-2, 1.0]]])
        assert agreement.within_margin(metric, torch.tensor([[1, 1, 0, 2]], dtype=torch.int32), 1, 0).all()
        assert not agreement.within_margin(metric, torch.tensor([[0, 1, 2, 2]], dtype=torch.int32), 1, 0).any()

    def test_refuses_a_worse_partner(self, case):
        metric, assign, p = case
        worse = assign.clone()
        first_b_row = int(assign[0, p + 1 - p % 2])
        merged = p + p % 2 + 2 * int((assign[0, p + p % 2 :: 2] >= first_b_row).int().argmax())
        worse[0, merged] = first_b_row + (int(assign[0, merged]) - first_b_row + 1) % 15
        assert agreement.within_margin(metric, worse, 7, p).tolist() == [False, True, True]

    def test_refuses_rows_out_of_order(self, case):
        metric, assign, p = case
        kept = [n for n in range(p + p % 2, 40, 2) if assign[1, n] < assign[1, p + 1 - p % 2]][:2]
        swapped = assign.clone()
        swapped[1, kept] = assign[1, kept[::-1]]
        assert agreement.within_margin(metric, swapped, 7, p).tolist() == [True, False, True]

    def test_refuses_another_number_of_merges(self, case):
        metric, _, p = case
        assert not agreement.within_margin(metric, reference.match(metric, 6, p), 7, p).any()

    def test_nothing_to_merge_is_the_identity(self):
        metric = torch.randn(2, 10, 4)
        identity = torch.arange(10, dtype=torch.int32).repeat(2, 1)
        assert agreement.within_margin(metric, identity, 0).all()
        assert not agreement.within_margin(metric, identity.flip(1), 0).any()
