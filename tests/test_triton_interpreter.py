"""Every Triton kernel on the CPU, in the repaired interpreter, over the table of cases against the oracle.

Uninitialised memory is NaN or the largest integer there, and every call checks that its inputs are unchanged. Layouts,
races and the rounding of tensor cores are invisible to an interpreter: test_triton_aot.py and test_gpu_triton.py.
"""

import pytest
import torch
from cases import MATCH_CASES, MERGE_CASES, TWO_WAY_CASES, MatchCase, MergeCase, by_id
from oracle import check_assign, check_merge, edge_scores, same
from triton_interpreter import interpreter

# match_merge launches the kernels of match and merge: what is left to see is how it puts them together.
MATCH_MERGE_CASES = [c for c in MATCH_CASES if c.small and c.trap == "random" and c.D in (0, 16) and not c.weighted]
# A program an output row: the interpreter takes a millisecond for each.
REDUCE_CASES = [c for c in MERGE_CASES if c.small and c.M < 400 and c.dtype != torch.float16]


@pytest.fixture(scope="module")
def triton():
    with interpreter() as call:
        yield call


@by_id(MATCH_CASES + [c for c in TWO_WAY_CASES if c.small or c.N == 201])
def test_match(case, triton):
    metric, weight = case.metric(), case.weight()
    assign = triton("match", metric, case.r, case.p, weight, **case.keywords)
    check_assign(assign, metric, case.r, case.p, weight, **case.keywords)


@by_id(MATCH_MERGE_CASES)
def test_match_merge(case, triton):
    x, metric, size = case.x(), case.metric(), case.size()
    out, size_out, assign = triton("match_merge", x, metric, case.r, case.p, size)
    check_assign(assign, metric, case.r, case.p)
    M = case.N - max(0, min(case.r, (case.N - case.p) // 2))
    check_merge((out, size_out), x, assign, M, size)
    assert same(out[:, : case.p], x[:, : case.p])


def _check_merge(case, reduce, triton):
    x, assign, size, weight = case.x(), case.assign(), case.per_token("size"), case.per_token("weight")
    got = triton("merge", x, assign, case.M, size, weight, reduce=reduce)
    check_merge(got, x, assign, case.M, size, weight, reduce)


@by_id(MERGE_CASES)
def test_merge_mean(case, triton):
    _check_merge(case, "mean", triton)


@pytest.mark.parametrize("reduce", ["sum", "amax"])
@by_id(REDUCE_CASES)
def test_merge(case, reduce, triton):
    _check_merge(case, reduce, triton)


@by_id(MERGE_CASES)
def test_unmerge(case, triton):
    y, assign = case.y(), case.assign()
    x = triton("unmerge", y, assign)
    rows = assign.long()
    kept = (rows >= 0) & (rows < case.M)
    want = torch.zeros(case.B, case.N, case.C, dtype=y.dtype)
    for b in range(case.B):
        want[b, kept[b]] = y[b, rows[b, kept[b]]]
    assert same(x, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_image_alone_equals_the_batch(dtype, triton):
    case = MatchCase(B=2, N=40, r=12, dtype=dtype, trap="alike")
    inputs = case.x(), case.metric(), case.size()
    batch = triton("match_merge", inputs[0], inputs[1], case.r, case.p, inputs[2])
    for b in range(case.B):
        x, metric, size = (t[b : b + 1] for t in inputs)
        alone = triton("match_merge", x, metric, case.r, case.p, size)
        assert all(same(one, whole[b : b + 1]) for one, whole in zip(alone, batch, strict=True))


def test_both_ways_of_one_image_alone_equal_the_batch(triton):
    case = MatchCase(B=2, N=150, r=70, trap="duplicates", weighted=True, power=2.0, two_way=True)
    metric, weight = case.metric(), case.weight()
    batch = triton("match", metric, case.r, case.p, weight, **case.keywords)
    for b in range(case.B):
        alone = triton("match", metric[b : b + 1], case.r, case.p, weight[b : b + 1], **case.keywords)
        assert same(alone, batch[b : b + 1])


@pytest.mark.parametrize("weighted", [False, True], ids=["cosine", "weighted"])
def test_the_way_back_has_the_scores_of_the_way_there(weighted, triton):
    """No a leaves at r = 1, so that the best of all edges is the same number in both directions."""
    case = MatchCase(B=2, N=197, H=2, D=72, r=1, trap="alike", weighted=weighted, power=2.0, two_way=True)
    triton("match", case.metric(), case.r, case.p, case.weight(), **case.keywords)
    there, back = (triton.launched[kernel]["edge_ptr"] for kernel in ("edges_kernel", "back_kernel"))
    assert torch.equal(there.amax(1), back.amax(1))


def test_nearly_tied_keys(triton):
    """ViT-like keys, whose deciding gaps are 1e-5; float64 decides a few of the images by more than the margin."""
    g = torch.Generator().manual_seed(0)
    keys = 4 * torch.randn(1, 6, 1, 64, generator=g) + 0.4 * torch.randn(16, 6, 197, 64, generator=g)
    assert check_assign(triton("match", keys, 13), keys, 13, 1) >= 8


@pytest.mark.parametrize("power", [None, 1.0, 2.0, 0.3])
@pytest.mark.parametrize("D", [3, 64, 200])
def test_edges_obey_the_precision_rule(D, power, triton):
    """Without the smallest of the six products they would be 2e-6 off, too little for any assignment to tell."""
    case = MatchCase(B=1, N=90, H=2, D=D, trap="alike", weighted=power is not None)
    metric, weight = case.metric(), case.weight()
    triton("match", metric, case.r, case.p, weight, power=power or 1.0)
    exact, _, _ = edge_scores(metric[0], case.p, None if weight is None else weight[0], power or 1.0)
    edge = triton.launched["edges_kernel"]["edge_ptr"]
    assert (edge.double() - torch.from_numpy(exact.max(1))).abs().max() < 1e-6


@pytest.mark.parametrize("weighted", [False, True], ids=["cosine", "weighted"])
def test_an_edge_of_nan_is_minus_infinity(weighted, triton):
    case = MatchCase(B=1, trap="nan", weighted=weighted)
    metric, weight = case.metric(), case.weight()
    triton("match", metric, case.r, case.p, weight)
    exact, _, _ = edge_scores(metric[0], case.p, weight[0] if weighted else None)
    lost = torch.from_numpy(exact.max(1)).isneginf()
    assert lost.any()
    assert torch.equal(triton.launched["edges_kernel"]["edge_ptr"][0].isneginf(), lost)


def test_power_zero_of_opposite_keys(triton):
    """0^0 = 1: all edges are the product of the weights."""
    metric = torch.tensor([1.0, -1.0]).repeat(10)[None, :, None]
    weight = torch.arange(1.0, 21.0)[None]
    assert check_assign(triton("match", metric, 3, 0, weight, power=0.0), metric, 3, 0, weight, 0.0) == 1


def test_ties_across_tiles_go_to_the_lowest_index(triton):
    """5 different rows a and 5 rows b, over several tiles of both: 30 equal edges, the best 40 rows end in a tie."""
    metric = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)).repeat(30, 1)[None]
    assert check_assign(triton("match", metric, 40, 0), metric, 40, 0) == 1


def test_rows_ranked_by_a_kernel_of_their_own(triton):
    case = MatchCase(B=1, N=1101, H=0, D=8, r=300, trap="duplicates")
    metric = case.metric()
    assign = triton("match", metric, case.r, case.p)
    assert list(triton.launched) == ["unit_kernel", "edges_kernel", "rank_kernel", "assign_kernel"]
    check_assign(assign, metric, case.r, case.p)
    assign = triton("match", metric, case.r, case.p, two_way=True)
    check_assign(assign, metric, case.r, case.p, two_way=True)


@pytest.mark.parametrize("kind,reduce", [("hostile", "mean"), ("one", "sum"), ("random", "amax")])
def test_members_from_lists(kind, reduce, triton):
    case = MergeCase(B=1, N=1030, M=3, C=5, kind=kind, size="count")
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    got = triton("merge", x, assign, case.M, size, reduce=reduce)
    assert list(triton.launched) == ["order_kernel", "merge_kernel"]
    check_merge(got, x, assign, case.M, size, reduce=reduce)


def test_a_row_longer_than_the_registers(triton):
    case = MatchCase(B=1, N=20, H=2, D=1500, r=4, trap="nan")
    metric = case.metric()
    check_assign(triton("match", metric, case.r, case.p), metric, case.r, case.p)


def test_the_kernels_are_what_runs(triton):
    case = MatchCase(N=9, C=3, D=2, r=2)
    triton("match_merge", case.x(), case.metric(), case.r, case.p, case.size())
    assert list(triton.launched) == ["unit_kernel", "edges_kernel", "assign_kernel", "merge_kernel"]
    triton("match", case.metric(), case.r, two_way=True)
    assert list(triton.launched) == ["unit_kernel", "edges_kernel", "assign_kernel", "back_kernel", "follow_kernel"]
    triton("unmerge", case.x(), torch.zeros(2, 4, dtype=torch.int32))
    assert list(triton.launched) == ["unmerge_kernel"]


def test_a_single_member_is_copied_bit_for_bit(triton):
    """-0 and the payload of a NaN included, whatever its weight."""
    bits = torch.tensor([0x8000, 0x7FC1, 0xFFAB, 0x0001], dtype=torch.uint16).repeat(3, 1)[None]
    x = bits.view(torch.bfloat16)
    assign = torch.tensor([[1, -1, 0]], dtype=torch.int32)
    weight = torch.tensor([[0.0, 1.0, torch.nan]])
    for reduce in ("mean", "amax"):
        out, _ = triton("merge", x, assign, 2, None, weight, reduce=reduce)
        assert torch.equal(out.view(torch.uint16), bits[:, :2])


def test_float64_is_refused(triton):
    x, assign = torch.zeros(1, 4, 2, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.int32)
    expected = "must be float32, float16 or bfloat16 on a CUDA device, got float64"
    with pytest.raises(RuntimeError, match=f"^match: metric {expected}"):
        triton("match", x, 1)
    with pytest.raises(RuntimeError, match=f"^merge: x {expected}"):
        triton("merge", x, assign, 2)
    with pytest.raises(RuntimeError, match=f"^unmerge: y {expected}"):
        triton("unmerge", x, assign)
    with pytest.raises(RuntimeError, match=f"^match_merge: metric {expected}"):
        triton("match_merge", x.float(), x, 1)


def test_bad_input_is_refused_as_everywhere(triton):
    with pytest.raises(RuntimeError, match=r"^match: prefix must be in \[0, N\] = \[0, 4\], got 5"):
        triton("match", torch.zeros(1, 4, 2), 1, 5)
    with pytest.raises(RuntimeError, match=r"^merge: assign must be int32 \[B, N\] = \[1, 4\], got int64 \[1, 4\]"):
        triton("merge", torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.int64), 2)


def test_stray_rows_are_an_error_under_debug(monkeypatch):
    from tokred_kernels.triton import _launch

    assign = torch.tensor([[0, -1, 5]], dtype=torch.int32)
    _launch.refuse_stray_rows("merge", assign, 3)
    monkeypatch.setattr(_launch, "_DEBUG", True)
    _launch.refuse_stray_rows("merge", assign, 6)
    with pytest.raises(
        RuntimeError, match=r"^merge: assign must be in \[-1, m\) = \[-1, 3\) under TOKRED_DEBUG=1, got 5"
    ):
        _launch.refuse_stray_rows("merge", assign, 3)
