"""What must hold for every attention (hypothesis): sizes are copies, masked keys are absent, scores are shares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred_kernels as tokred

settings.register_profile("tokred", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("tokred")


@st.composite
def inputs(draw, dtype=torch.float64):
    """q [B, H, Nq, D], k, v [B, H, N, D], size [B, N] of which some are 0, "cls" or "mean"."""
    B, H, D = draw(st.integers(1, 2)), draw(st.integers(1, 3)), 8 * draw(st.integers(1, 4))
    N, Nq = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = (torch.randn(B, H, n, D, generator=g, dtype=torch.float64).to(dtype) for n in (Nq, N, N))
    size = torch.randint(0, draw(st.integers(1, 6)), (B, N), generator=g).to(dtype)
    return q, k, v, size, draw(st.sampled_from(["cls", "mean"]))


@pytest.fixture(params=["cpu", "reference"], scope="module", autouse=True)
def backend(request):
    with tokred.use_backend(request.param):
        yield


def assert_close(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(inputs())
def test_a_key_of_size_m_counts_as_m_equal_keys(drawn):
    q, k, v, size, scores = drawn
    for b in range(q.shape[0]):
        times = size[b].long()
        copied_k, copied_v = (t[b : b + 1].repeat_interleave(times, 2) for t in (k, v))
        out, emitted = tokred.attention(q[b : b + 1], copied_k, copied_v, scores=scores)
        owner = torch.arange(k.shape[2]).repeat_interleave(times)
        shares = torch.zeros_like(size[b : b + 1]).index_add(1, owner, emitted)
        assert_close(
            tokred.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], size[b : b + 1], scores=scores), (out, shares)
        )


@given(inputs(), st.sampled_from([0.0, -2.0, float("nan")]), st.sampled_from([float("nan"), float("inf"), 1e300]))
def test_a_masked_key_is_absent_whatever_it_holds(drawn, mark, garbage):
    q, k, v, size, scores = drawn
    masked = size == 0
    dirty_k, dirty_v = (t.masked_fill(masked[:, None, :, None], garbage) for t in (k, v))
    got = tokred.attention(q, dirty_k, dirty_v, size.masked_fill(masked, mark), scores=scores)
    assert (got[1][masked] == 0).all()
    for b in range(q.shape[0]):
        kept = ~masked[b]
        out, emitted = tokred.attention(
            q[b : b + 1], k[b : b + 1, :, kept], v[b : b + 1, :, kept], size[b : b + 1, kept], scores=scores
        )
        assert_close((got[0][b : b + 1], got[1][b : b + 1, kept]), (out, emitted))


@given(inputs(), st.randoms(use_true_random=False))
def test_permuted_keys_permute_the_scores_and_nothing_else(drawn, random):
    q, k, v, size, scores = drawn
    order = list(range(k.shape[2]))
    random.shuffle(order)
    out, emitted = tokred.attention(q, k, v, size, scores=scores)
    assert_close(
        tokred.attention(q, k[:, :, order], v[:, :, order], size[:, order], scores=scores), (out, emitted[:, order])
    )


@given(inputs(), st.randoms(use_true_random=False))
def test_permuted_queries_permute_the_output(drawn, random):
    q, k, v, size, _ = drawn
    order = list(range(q.shape[2]))
    random.shuffle(order)
    out, emitted = tokred.attention(q, k, v, size, scores="mean")
    assert_close(tokred.attention(q[:, :, order], k, v, size, scores="mean"), (out[:, :, order], emitted))


@given(inputs(torch.float32))
def test_scores_are_shares_and_outputs_averages(drawn):
    q, k, v, size, scores = drawn
    out, emitted = tokred.attention(q, k, v, size, scores=scores)
    any_left = (size > 0).any(1)
    assert (emitted >= 0).all()
    # H Nq N roundings of numbers that add up to 1, and those of each row's own sum.
    torch.testing.assert_close(emitted.sum(1), any_left.float(), rtol=1e-5, atol=0)
    low, high = (
        v.masked_fill((size == 0)[:, None, :, None], sign * torch.inf).aminmax(dim=2, keepdim=True)[side]
        for sign, side in ((1, 0), (-1, 1))
    )
    slack = 1e-5 * v.abs().max()
    inside = (out >= low - slack) & (out <= high + slack)
    assert inside[any_left].all() and not out[~any_left].any()


@given(inputs(), st.floats(1e-3, 1e3))
def test_only_the_ratio_of_sizes_counts(drawn, factor):
    q, k, v, size, scores = drawn
    assert_close(
        tokred.attention(q, k, v, size * factor, scores=scores), tokred.attention(q, k, v, size, scores=scores)
    )


@given(inputs())
def test_the_scores_alone_are_the_same_scores(drawn):
    q, k, v, size, scores = drawn
    emitted = tokred.attention(q, k, v, size, scores=scores)[1]
    assert_close([tokred.attention_scores(q, k, size, scores=scores)], [emitted])
