"""Every op on the CPU, by every instruction set and by the reference, over the table of cases against the oracle."""

import pytest
import torch
from cases import ISAS, MATCH_CASES, MERGE_CASES, TWO_WAY_CASES, by_id
from oracle import check_assign, check_merge, same

import tokred_kernels as tokred

REDUCE = ("mean", "sum", "amax")


def with_float64(cases):
    """The float32 cases again in float64, which the CPU and the reference have for gradcheck."""
    import dataclasses

    return cases + [dataclasses.replace(c, dtype=torch.float64) for c in cases if c.dtype == torch.float32]


@by_id(with_float64(MATCH_CASES + TWO_WAY_CASES))
def test_match(case, backend, poisoned):
    metric, weight = case.metric(), case.weight()
    before = metric.clone(), None if weight is None else weight.clone()
    assign = tokred.match(metric, case.r, case.p, weight, **case.keywords)
    check_assign(assign, metric, case.r, case.p, weight, **case.keywords)
    assert same(metric, before[0])
    assert weight is None or same(weight, before[1])


@by_id(with_float64(MATCH_CASES))
def test_match_merge(case, backend, poisoned):
    x, metric, size = case.x(), case.metric(), case.size()
    before = [t.clone() for t in (x, metric, size)]
    out, size_out, assign = tokred.match_merge(x, metric, case.r, case.p, size)
    assert same(assign, tokred.match(metric, case.r, case.p))
    M = case.N - max(0, min(case.r, (case.N - case.p) // 2))
    check_merge((out, size_out), x, assign, M, size)
    assert same(out[:, : case.p], x[:, : case.p])  # the prefix, bit for bit
    assert all(same(a, b) for a, b in zip((x, metric, size), before, strict=True))
    storages = {t.untyped_storage().data_ptr() for t in (x, metric, size) if t.numel()}
    assert not storages & {t.untyped_storage().data_ptr() for t in (out, size_out, assign) if t.numel()}


@pytest.mark.parametrize("reduce", REDUCE)
@by_id(with_float64(MERGE_CASES))
def test_merge(case, reduce, backend, poisoned):
    x, assign, size, weight = case.x(), case.assign(), case.per_token("size"), case.per_token("weight")
    before = [None if t is None else t.clone() for t in (x, assign, size, weight)]
    got = tokred.merge(x, assign, case.M, size, weight, reduce=reduce)
    check_merge(got, x, assign, case.M, size, weight, reduce)
    assert got[1].dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert all(a is None or same(a, b) for a, b in zip((x, assign, size, weight), before, strict=True))


@by_id(with_float64(MERGE_CASES))
def test_unmerge(case, backend, poisoned):
    y, assign = case.y(), case.assign()
    x = tokred.unmerge(y, assign)
    assert x.shape == (case.B, case.N, case.C)
    rows = assign.long()
    kept = (rows >= 0) & (rows < case.M)
    want = torch.zeros(case.B, case.N, case.C, dtype=y.dtype)
    for b in range(case.B):
        want[b, kept[b]] = y[b, rows[b, kept[b]]]
    assert same(x, want)


@by_id([c for c in MATCH_CASES if c.B > 1])
def test_match_one_image_alone_equals_the_batch(case, backend):
    x, metric, size = case.x(), case.metric(), case.size()
    batch = tokred.match_merge(x, metric, case.r, case.p, size)
    for b in range(case.B):
        alone = tokred.match_merge(x[b : b + 1], metric[b : b + 1], case.r, case.p, size[b : b + 1])
        assert all(same(one, whole[b : b + 1]) for one, whole in zip(alone, batch, strict=True))


@by_id([c for c in TWO_WAY_CASES if c.B > 1])
def test_two_way_match_of_one_image_alone_equals_the_batch(case, backend):
    metric, weight = case.metric(), case.weight()
    batch = tokred.match(metric, case.r, case.p, weight, **case.keywords)
    for b in range(case.B):
        one = None if weight is None else weight[b : b + 1]
        assert same(tokred.match(metric[b : b + 1], case.r, case.p, one, **case.keywords), batch[b : b + 1])


@pytest.mark.parametrize("reduce", REDUCE)
@by_id([c for c in MERGE_CASES if c.B > 1])
def test_merge_one_image_alone_equals_the_batch(case, reduce, backend):
    x, assign, size, weight = case.x(), case.assign(), case.per_token("size"), case.per_token("weight")
    batch = tokred.merge(x, assign, case.M, size, weight, reduce=reduce)
    for b in range(case.B):
        one = [None if t is None else t[b : b + 1] for t in (x, assign, size, weight)]
        alone = tokred.merge(one[0], one[1], case.M, one[2], one[3], reduce=reduce)
        assert all(same(a, whole[b : b + 1]) for a, whole in zip(alone, batch, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_equal_over_threads_and_runs(backend, dtype):
    g = torch.Generator().manual_seed(0)
    x, k = torch.randn(8, 197, 384, generator=g).to(dtype), torch.randn(8, 6, 197, 64, generator=g).to(dtype)
    size = torch.randint(1, 9, (8, 197), generator=g).float()
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 5):
            torch.set_num_threads(n)
            merged = tokred.match_merge(x, k, 40, 1, size)
            results.append([*merged, tokred.unmerge(merged[0], merged[2]), tokred.match(k, 40, two_way=True)])
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], again, strict=True))


def test_members_are_added_in_index_order(backend):
    """1 + 1e8 - 1e8 is 0 in this order and 1 in the other."""
    x = torch.tensor([1.0, 1e8, -1e8])
    assign = torch.zeros(1, 3, dtype=torch.int32)
    for wide in (1, 5, 70):  # a tail, a vector, several
        out, size = tokred.merge(x[None, :, None].expand(-1, -1, wide), assign, 1, x[None], reduce="sum")
        assert torch.equal(out, torch.zeros(1, 1, wide)) and torch.equal(size, torch.zeros(1, 1))


def test_a_nan_of_all_ones_stays_nan_in_bfloat16(backend):
    """Rounding to nearest even by adding to the bits would carry it over to -0."""
    weight = torch.full((1, 2), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    out, _ = tokred.merge(
        torch.ones(1, 2, 40, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int32), 1, None, weight
    )
    assert out.isnan().all()


def test_opposite_keys_have_an_edge_of_zero_not_of_nan(backend):
    """A cosine that rounds below -1 has no square root: without the clamp the edge would count as -inf."""
    a = torch.randn(64, 2, 33, generator=torch.Generator().manual_seed(0))
    metric = torch.stack([a[:, 0], a[:, 1], a[:, 1], -a[:, 0]], 1)
    weight = torch.tensor([1.0, torch.nan, 1.0, 1.0]).expand(64, -1)  # the other column is -inf
    assign = tokred.match(metric, 2, 0, weight, power=0.5)
    assert (assign[:, 0] == 1).all()


def test_offsets_past_2_to_the_31(backend):
    """Rows 2^30 elements apart: memory of which only the rows themselves are ever touched."""
    far = 2**30
    memory = torch.empty(3 * far + 64, dtype=torch.bfloat16)
    x = memory.as_strided((1, 4, 16), (0, far, 1))
    x.copy_(torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)))
    near, assign = x.clone(), torch.tensor([[0, 2, 1, 2]], dtype=torch.int32)
    for call in (
        lambda t: tokred.match_merge(t, t, 1),
        lambda t: tokred.match_merge(t, t.unsqueeze(1), 2, 0),
        lambda t: (tokred.match(t, 2, 0, two_way=True),),
        lambda t: tokred.merge(t, assign, 3),
        lambda t: (tokred.unmerge(t, assign),),
    ):
        assert all(same(a, b) for a, b in zip(call(x), call(near), strict=True))


def test_the_same_assignment_twice(backend):
    """An assignment is a value: it carries no state from one use to the next."""
    case = MERGE_CASES[0]
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    first = tokred.merge(x, assign, case.M, size)
    again = tokred.merge(x, assign, case.M, size)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_precision_on_nearly_tied_keys(backend):
    """ViT-like keys, whose deciding gaps are 1e-5: a metric rounded to half would decide most images otherwise."""
    g = torch.Generator().manual_seed(0)
    k = 4 * torch.randn(1, 6, 1, 64, generator=g) + 0.4 * torch.randn(16, 6, 197, 64, generator=g)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        keys = k.to(dtype)
        assert check_assign(tokred.match(keys, 13), keys, 13, 1) >= 8  # the others are closer than the precision rule
        rounded = (keys.float().mean(1) / keys.float().mean(1).norm(dim=-1, keepdim=True)).bfloat16()
        assert not torch.equal(tokred.match(rounded, 13), tokred.match(keys, 13))  # the test can tell


def test_cpu_reads_no_further_than_the_last_rank_in_float64():
    """Regression: 5 rows in AVX2's 4 lanes of double were ranked with 2 lanes of uninitialised memory."""
    case = next(c for c in MATCH_CASES if c.N == 9 and c.D == 3)
    metric = case.metric().double()
    for isa in ISAS:
        try:
            with tokred.use_backend("cpu", isa=isa):
                assign = tokred.match(metric, case.r, case.p)
        except RuntimeError:
            continue
        check_assign(assign, metric, case.r, case.p)
