"""What must hold for every input (hypothesis): the properties of an assignment, of averages, of composition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred_kernels as tokred

settings.register_profile("tokred", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("tokred")


@st.composite
def images(draw, min_patches: int = 0):
    """(x [B, N, C], keys [B, H, N, D], r, p, size)."""
    p = draw(st.integers(0, 5))
    N = p + draw(st.integers(min_patches, 40))
    B, H, D, C = (draw(st.integers(1, n)) for n in (3, 3, 20, 20))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    x, k = torch.randn(B, N, C, generator=g).to(dtype), torch.randn(B, H, N, D, generator=g).to(dtype)
    if draw(st.booleans()):  # ties: few different tokens
        k = k[:, :, torch.arange(N) % draw(st.integers(1, 4))]
    size = torch.randint(1, 9, (B, N), generator=g).float()
    size[:, :p] = 1
    return x, k, draw(st.integers(-2, N + 2)), p, size


@pytest.fixture(params=["cpu", "reference"], scope="module", autouse=True)
def backend(request):
    with tokred.use_backend(request.param):
        yield


def exact(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8)


@given(images())
def test_an_assignment_is_onto_and_keeps_mass_and_prefix(image):
    x, k, r, p, size = image
    N = x.shape[1]
    out, size_out, assign = tokred.match_merge(x, k, r, p, size)
    M = N - max(0, min(r, (N - p) // 2))
    assert out.shape[1] == M
    for rows in assign:
        assert sorted(set(rows.tolist())) == list(range(M))
    assert torch.equal(size_out.sum(1).double(), size.sum(1).double())
    assert torch.equal(exact(out[:, :p].contiguous()), exact(x[:, :p].contiguous()))
    assert (size_out[:, :p] == 1).all()


@given(images(), st.booleans())
def test_two_ways_remove_r_and_leave_the_prefix(image, weighted):
    """Half of them from each set, and every row has a member of the set whose row it is."""
    _, k, r, p, size = image
    N = k.shape[2]
    assign = tokred.match(k, r, p, size if weighted else None, two_way=True)
    r = max(0, min(r, (N - p) // 2))
    stayed = len(range(p + p % 2, N, 2)) - r // 2  # of a
    for rows in assign.tolist():
        assert rows[:p] == list(range(p))
        assert sorted(set(rows[p:])) == list(range(p, N - r))
        if r > 0:
            of_a, of_b = rows[p + p % 2 :: 2], rows[p + 1 - p % 2 :: 2]
            assert set(of_a) >= set(range(p, p + stayed))
            assert sorted(row for row in of_b if row >= p + stayed) == list(range(p + stayed, N - r))


@given(images(min_patches=2))
def test_two_ways_begin_as_one(image):
    """What r // 2 one way puts into one row stays together."""
    _, k, r, p, _ = image
    N = k.shape[2]
    r = max(0, min(r, (N - p) // 2))
    both, one = tokred.match(k, r, p, two_way=True), tokred.match(k, r // 2, p)
    for rows, rows_of_one in zip(both.tolist(), one.tolist(), strict=True):
        row_of = {}
        for row, row_of_one in zip(rows, rows_of_one, strict=True):
            assert row_of.setdefault(row_of_one, row) == row


@given(images())
def test_r_zero_is_the_identity(image):
    x, k, _, p, size = image
    out, size_out, assign = tokred.match_merge(x, k, 0, p, size)
    assert torch.equal(exact(out), exact(x)) and torch.equal(size_out.float(), size)
    assert torch.equal(assign, torch.arange(x.shape[1], dtype=torch.int32).expand_as(assign))
    assert torch.equal(tokred.match(k, 0, p, two_way=True), assign)


@given(images(), st.floats(-100, 100, width=16))
def test_constant_features_stay_constant_under_the_mean(image, value):
    x, k, r, p, size = image
    x = torch.full_like(x, value)
    out, _, _ = tokred.match_merge(x, k, r, p, size)
    # One rounding of the sum, one of the quotient.
    torch.testing.assert_close(out, torch.full_like(out, value), rtol=2 * torch.finfo(x.dtype).eps, atol=0)


@given(images())
def test_unmerge_of_merge_is_the_group_average_and_idempotent(image):
    x, k, r, p, size = image
    out, _, assign = tokred.match_merge(x, k, r, p, size)
    back = tokred.unmerge(out, assign)
    for b in range(x.shape[0]):
        assert torch.equal(exact(back[b]), exact(out[b, assign[b].long()]))
    again, _ = tokred.merge(back, assign, out.shape[1], size)
    torch.testing.assert_close(tokred.unmerge(again, assign), back, rtol=4 * torch.finfo(x.dtype).eps, atol=1e-7)


@given(images(min_patches=4), st.integers(0, 20))
def test_composed_assignments_and_sizes_equal_one_step(image, r2):
    """The size-weighted mean is associative: two steps equal the union in one, and the maps compose."""
    x, k, r, p, size = image
    x, k = x.double(), k.double()
    size = size.double()
    out1, size1, assign1 = tokred.match_merge(x, k, r, p, size)
    out2, size2, assign2 = tokred.match_merge(out1, out1, r2, p, size1)
    composed = assign2.gather(1, assign1.long())
    union, size_union = tokred.merge(x, composed, out2.shape[1], size)
    torch.testing.assert_close(out2, union)
    torch.testing.assert_close(size2, size_union)


@given(images(min_patches=2))
def test_an_image_alone_gives_the_same_plan_as_in_a_batch(image):
    x, k, r, p, size = image
    batch = tokred.match_merge(x, k, r, p, size)
    for b in range(x.shape[0]):
        alone = tokred.match_merge(x[b : b + 1], k[b : b + 1], r, p, size[b : b + 1])
        assert all(torch.equal(exact(one), exact(all_[b : b + 1])) for one, all_ in zip(alone, batch, strict=True))


@given(images(min_patches=2))
def test_a_power_of_two_scale_of_the_keys_changes_nothing(image):
    """Cosine similarity: exact under powers of two, away from the norm's floor."""
    _, k, r, p, _ = image
    assert (
        torch.equal(tokred.match(k, r, p), tokred.match(k * 4, r, p)) or (k.float().mean(1).norm(dim=-1) < 1e-5).any()
    )


@given(images(min_patches=2))
def test_with_weights_of_zero_every_edge_ties(image):
    """The first a merges into the first b."""
    _, k, _, p, _ = image
    weight = torch.zeros(k.shape[0], k.shape[2])
    assign = tokred.match(k, 1, p, weight)
    assert (assign[:, p + p % 2] == assign[:, p + 1 - p % 2]).all()


@st.composite
def selections(draw):
    """(x [B, N, C], score [B, N], k, p)."""
    x, _, k, p, _ = draw(images())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = torch.rand(x.shape[:2], generator=g)
    levels = draw(st.sampled_from([0, 1, 3, 10]))  # ties
    return x, (score * levels).floor() / levels if levels else score, max(k, 0), p


@given(selections())
def test_the_kept_are_the_best_in_their_order(selection):
    x, score, k, p = selection
    N = x.shape[1]
    assign = tokred.topk(score, k, p)
    for rows, s in zip(assign, score, strict=True):
        assert rows[rows >= 0].tolist() == list(range(min(N, p + k)))
        kept, dropped = s[p:][rows[p:] >= 0], s[p:][rows[p:] < 0]
        assert len(kept) == 0 or len(dropped) == 0 or kept.min() >= dropped.max()
        tied = rows[p:][s[p:] == kept.min()] if len(kept) else rows[:0]
        assert (tied >= 0).tolist() == sorted((tied >= 0).tolist(), reverse=True)  # the first of equal ones


@given(selections())
def test_one_more_kept_is_the_same_and_one_more(selection):
    _, score, k, p = selection
    fewer, more = tokred.topk(score, k, p) >= 0, tokred.topk(score, k + 1, p) >= 0
    assert (fewer <= more).all()
    assert ((more.sum(1) - fewer.sum(1)) == (k < score.shape[1] - p)).all()


@given(selections())
def test_an_order_preserving_change_of_the_scores_keeps_the_selection(selection):
    _, score, k, p = selection
    for other in (score * 4, score.double(), 3 * score.double() - 2):  # exact, so that no two become equal
        assert torch.equal(tokred.topk(other, k, p), tokred.topk(score, k, p))


@given(selections(), st.sampled_from(["none", "sum", "mean"]))
def test_a_gather_is_the_merge_of_its_assignment(selection, fuse):
    x, score, k, p = selection
    out, assign = tokred.topk_gather(x, score, k, p, fuse=fuse)
    back = tokred.unmerge(out, assign)
    kept = (assign >= 0) & (assign < p + k) if k < x.shape[1] - p else assign >= 0
    assert torch.equal(exact(back[kept]), exact(x[kept]))
    weight = torch.where(kept, 1, score)
    merged, _ = tokred.merge(x, assign, out.shape[1], None, weight, reduce="sum" if fuse == "sum" else "mean")
    torch.testing.assert_close(out, merged, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-7)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_proportional_attention_equals_copies(N, copies, seed):
    """A key of size m counts as m equal keys: softmax(q k / sqrt(d) + log size)."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, N, 8, generator=g, dtype=torch.float64) for _ in range(3))
    size = torch.ones(N, dtype=torch.float64)
    size[0] = copies
    repeat = [copies] + [1] * (N - 1)
    wide_k, wide_v = (t.repeat_interleave(torch.tensor(repeat), 2) for t in (k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(sdpa(q, k, v, attn_mask=size.log()[None, None, None]), sdpa(q, wide_k, wide_v))
