"""kth and random: every source into its most similar destination, against plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred_kernels as tokred
from tokred_kernels import partition


def cosine(a, b):
    """Of two rows in float64; norms as in match."""
    length = [max(math.sqrt(sum(x * x for x in t)), 1e-6) for t in (a, b)]
    return sum(x * y for x, y in zip(a, b, strict=True)) / (length[0] * length[1])


def check(assign, metric, prefix, destinations):
    """assign [N] of one image: destinations are patches, numbered behind the prefix, ascending."""
    rows = metric.double().tolist()
    assert assign[:prefix].tolist() == list(range(prefix))
    for patch in range(len(rows) - prefix):
        row = assign[prefix + patch].item() - prefix
        if patch in destinations:
            assert row == destinations.index(patch)
            continue
        score = [cosine(rows[prefix + patch], rows[prefix + d]) for d in destinations]
        assert 0 <= row < len(score) and score[row] >= max(score) - 2e-6
        if sorted(score)[-2:][0] < max(score) - 2e-6:
            assert score[row] == max(score)


def ends(P, k):
    return [n for n in range(P) if n % k == k - 1] if k <= P else list(range(P))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 21), st.integers(1, 8), st.sampled_from([0, 1, 2, 5]), st.integers(0, 999), st.booleans())
def test_kth(P, k, prefix, seed, coarse):
    metric = torch.randn(2, prefix + P, 3, generator=torch.Generator().manual_seed(seed))
    metric = metric.round() if coarse else metric  # ties, and rows of 0
    assign = partition.kth(metric, k, prefix)
    assert assign.dtype == torch.int32 and assign.shape == (2, prefix + P)
    for n in range(2):
        check(assign[n], metric[n], prefix, ends(P, k))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 21), st.integers(-1, 25), st.sampled_from([0, 1, 2, 5]), st.integers(0, 999))
def test_random(P, r, prefix, seed):
    metric = torch.randn(3, prefix + P, 4, generator=torch.Generator().manual_seed(seed))
    assign = partition.random(metric, r, prefix, generator=torch.Generator().manual_seed(seed))
    again = partition.random(metric, r, prefix, generator=torch.Generator().manual_seed(seed))
    M = prefix + P - max(0, min(r, P - 1))
    assert assign.dtype == torch.int32 and torch.equal(assign, again)
    for n in range(3):
        assert assign[n].unique().tolist() == list(range(M))
        # Who the destinations are, only the generator knows: of some choice of one token a row all is right.
        rows = assign[n, prefix:].tolist()
        candidates = [[j for j, row in enumerate(rows) if row == prefix + c] for c in range(M - prefix)]
        singles = [c[0] for c in candidates if len(c) == 1]
        assert singles == sorted(singles)


def test_random_merges_into_the_most_similar_of_the_others(monkeypatch):
    metric = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.55, 0.0]]).repeat(2, 1)
    drawn[1] = drawn[1].flip(0)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn)
    assign = partition.random(metric, 4, 1)
    for n in range(2):
        order = sorted(range(11), key=lambda j: drawn[n, j].item())
        check(assign[n], metric[n], 1, sorted(order[4:]))


def test_draws_differ_between_images_and_seeds_and_leave_the_global_state_alone():
    metric = torch.randn(2, 33, 4)
    state = torch.get_rng_state()
    a, b = (partition.random(metric, 9, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])


def test_the_second_of_two_is_the_even_and_odd_split_with_everything_merged():
    """Without a prefix, k = 2 is what match does with r = N // 2."""
    metric = torch.randn(3, 16, 8)
    assert torch.equal(partition.kth(metric, 2, 0), tokred.match(metric, 8, 0))


def test_nothing_is_dropped_and_sizes_add_up():
    """17 patches in groups of 5: three destinations, and the two behind the last group merge too."""
    x = torch.randn(2, 18, 8)
    assign = partition.kth(x, 5)
    out, size = tokred.merge(x, assign, 4)
    assert size.sum(1).tolist() == [18, 18] and torch.equal(out[:, 0], x[:, 0])
    assert tokred.unmerge(out, assign).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keys_of_any_dtype_are_compared_by_their_head_mean(dtype):
    keys = torch.randn(2, 3, 13, 8).to(dtype)
    mean = keys.to(torch.promote_types(dtype, torch.float32)).mean(1)
    assert torch.equal(partition.kth(keys, 4), partition.kth(mean, 4))


def test_equal_zero_and_nan_rows_fall_to_the_first_destination():
    for value in (1.0, 0.0, float("nan")):
        assign = partition.kth(torch.full((1, 13, 4), value), 3)
        assert assign[0].tolist() == [0, 1, 1, 1, 1, 1, 2, 1, 1, 3, 1, 1, 4]


def test_one_graph():
    metric = torch.randn(2, 14, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: partition.kth(t, 3), backend="eager", fullgraph=True)
    assert torch.equal(compiled(metric), partition.kth(metric, 3))
    with pytest.raises(ValueError, match=r"^kth: k must be at least 1, got 0$"):
        partition.kth(metric, 0)


def test_an_empty_batch():
    assert partition.kth(torch.randn(0, 9, 4), 2).shape == partition.random(torch.randn(0, 9, 4), 2).shape == (0, 9)
