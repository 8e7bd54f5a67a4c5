"""K-Medoids and DPC-KNN in plain PyTorch: they compute what our methods compute, and the benchmark checks that."""

import copy
import dataclasses

import pytest
import torch

from benchmarks import clusters, goals


@pytest.fixture(scope="module")
def given():
    return clusters.inputs(B=2, P=40, C=24, k=15)


@pytest.mark.parametrize("case", clusters.METHODS, ids="-".join)
@torch.inference_mode()
def test_plain_form_equals_the_method(case, given):
    """In float64, where no near-tie falls the other way."""
    score = copy.deepcopy(given.score).double()
    wide = dataclasses.replace(given, x=given.x.double(), weight=given.weight.double(), score=score)
    (rows, label), (want, want_label) = (form(wide) for form in clusters.METHODS[case])
    assert torch.equal(label, want_label.int())
    torch.testing.assert_close(rows, want, rtol=1e-5, atol=1e-5)  # the published mean adds 1e-6 to its weights


@pytest.mark.parametrize("case", clusters.METHODS, ids="-".join)
@torch.inference_mode()
def test_a_wrong_result_is_not_timed(case, given):
    rows, label = clusters.METHODS[case][1](given)
    clusters.check(clusters.METHODS[case][0](given), (rows, label))
    with pytest.raises(AssertionError, match="same cluster"):
        clusters.check((rows, label.flip(1)), (rows, label))
    with pytest.raises(AssertionError):
        clusters.check((rows + 1, label), (rows, label))
    with pytest.raises(AssertionError, match="number of clusters"):
        clusters.check((rows[:, 1:], label), (rows, label))


def test_figures_are_those_of_the_goals():
    assert {goal for goal, _ in clusters.METHODS} == {goal.id for goal in goals.CPU if goal.id.startswith("C11")}
