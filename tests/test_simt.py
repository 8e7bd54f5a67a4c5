"""Every CUDA kernel on the host, by the emulator in simt/: against the oracle, over the shared cases and schedules."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from cases import MATCH_CASES, MERGE_CASES, TWO_WAY_CASES, MatchCase, MergeCase
from simt import counting, ops
from simt.ops import H200

from tokred_kernels import reference

SEEDS = (0, 1, 2)  # 0: threads in order
FEW = (1, 99 << 10)  # a small device: one multiprocessor, little shared memory
MANY = (100_000, 0)  # several blocks an image for every shape

# Shapes that take every path and every tile of the kernels; MATCH_CASES has the traps.
SPLIT_CASES = [
    MatchCase(B=1, N=258, D=8, H=0, r=20, p=2),
    MatchCase(B=2, N=301, D=64, H=2, r=100, p=1, dtype=torch.float16, trap="alike"),
    MatchCase(B=1, N=700, D=16, H=0, r=350, p=0, trap="duplicates"),
    MatchCase(B=1, N=270, D=129, H=2, r=30, p=5, dtype=torch.bfloat16, trap="alike"),
    MatchCase(B=1, N=60, D=200, H=0, r=13, trap="alike"),
    MatchCase(B=2, N=60, D=200, H=0, r=13, weighted=True, power=2.0),
    MatchCase(B=1, N=60, D=200, H=0, r=13, trap="all-nan"),
]
SPLIT_CASES += [dataclasses.replace(c, two_way=True) for c in SPLIT_CASES]
SCHEDULED = [c for c in MATCH_CASES + TWO_WAY_CASES[::3] if c.small and c.p == 1]
TILE_CASES = [MatchCase(B=1, N=n, D=8, H=0, r=n // 4, p=1) for n in (3, 128, 130, 162, 194, 226, 500)]
TILE_CASES += [dataclasses.replace(c, two_way=True) for c in TILE_CASES]


def check_match(case: MatchCase, assign: torch.Tensor) -> None:
    oracle.check_assign(assign, case.metric(), case.r, case.p, case.weight(), **case.keywords)


def run_match(case: MatchCase, **kwargs) -> torch.Tensor:
    return ops.match(case.metric(), case.r, case.p, case.weight(), **case.keywords, **kwargs)


@pytest.mark.parametrize("case", MATCH_CASES + TWO_WAY_CASES + TILE_CASES, ids=lambda c: c.id)
def test_match(case):
    check_match(case, run_match(case))


@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda c: c.id)
def test_match_by_several_blocks(case):
    check_match(case, run_match(case, device=MANY))


@pytest.mark.parametrize("case", SCHEDULED, ids=lambda c: c.id)
def test_match_does_not_depend_on_the_schedule(case):
    first, *others = [run_match(case, seed=seed) for seed in SEEDS]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("trap", ["random", "alike", "duplicates", "nan", "signed-zero"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("two_way", [False, True])
def test_match_is_the_same_by_one_block_and_by_several(trap, weighted, two_way):
    case = MatchCase(
        B=3, N=290, D=72, H=2, r=60, dtype=torch.float16, trap=trap, weighted=weighted, power=2.0, two_way=two_way
    )
    by_one, by_several = (run_match(case, device=d) for d in ((1, 227 << 10), MANY))
    assert torch.equal(by_one, by_several)


@pytest.mark.parametrize("two_way", [False, True])
def test_match_is_the_same_where_rows_b_do_not_stay_in_shared_memory(two_way):
    case = MatchCase(B=1, N=577, D=64, H=1, r=100, trap="alike", two_way=two_way)
    assert torch.equal(run_match(case, device=FEW), run_match(case, device=(1, 227 << 10)))


@pytest.mark.parametrize(
    ("N", "D", "device", "launches"),
    [(1024, 128, H200, 1), (1026, 8, H200, 2), (1024, 136, H200, 2), (1024, 64, FEW, 1)],
)
def test_launches(N, D, device, launches):
    metric = torch.zeros(D).expand(100, 12, N, D)
    assert len(counting.launches("match", metric, 13, share=0, device=device)) == launches


@pytest.mark.parametrize(
    ("call", "dependent"),
    [
        (lambda x, t: counting.launches("match_merge", x, x, 13, share=0), [False, True]),
        (lambda x, t: counting.launches("match_merge", x, x, 13, share=0, device=MANY), [False, True, True]),
        (lambda x, t: counting.launches("match", x, 13, two_way=True, share=0, device=MANY), [False, *3 * [True]]),
        (lambda x, t: counting.launches("topk_gather", x, t.float(), 20, share=0), [False, True]),
        (lambda x, t: counting.launches("merge", x, t, 37, share=0), [False]),
    ],
    ids=["match_merge", "match_merge-by-several-blocks", "match-two-way", "topk_gather", "merge"],
)
def test_dependent_launches(call, dependent):
    x, per_token = torch.zeros(2, 50, 8), torch.zeros(2, 50, dtype=torch.int32)
    assert [launch.dependent for launch in call(x, per_token)] == dependent


@pytest.mark.parametrize("two_way", [False, True])
def test_match_of_an_image_is_that_of_the_batch(two_way):
    case = MatchCase(B=4, N=101, D=24, H=3, r=30, trap="alike", two_way=two_way)
    whole = run_match(case)
    single = [ops.match(case.metric()[b : b + 1], case.r, case.p, **case.keywords) for b in range(case.B)]
    assert torch.equal(whole, torch.cat(single))


def test_match_of_16384_tokens():
    N, r = 16384, 4000
    k = torch.randn(1, N, 8, generator=torch.Generator().manual_seed(0))
    assign = ops.match(k, r, 1)
    score = reference.match_scores(k, 1)[0].double()
    unit = torch.nn.functional.normalize(k[0].double(), dim=-1)
    a, b = unit[2::2], unit[1::2]
    first_b = 1 + len(a) - r
    of_a = assign[0, 2::2]
    gone = of_a >= first_b
    best = score.amax(1)
    chosen = (a[gone] * b[(of_a[gone] - first_b).long()]).sum(-1)
    assert gone.sum() == r
    assert (chosen >= best[gone] - oracle.MARGIN).all()
    assert best[gone].min() >= best[~gone].max() - oracle.MARGIN
    assert torch.equal(of_a[~gone], torch.arange(1, first_b, dtype=torch.int32))
    assert torch.equal(assign[0, 1::2], first_b + torch.arange(len(b), dtype=torch.int32))


@pytest.mark.parametrize("D", [8, 64, 128, 136, 768, 2048])
@pytest.mark.parametrize("trap", ["random", "alike"])
def test_scores_keep_the_bound_of_1e6(D, trap):
    """The precision rule. One chain of 2048 float32 roundings near 1 would break it: beyond 128, pieces of 64."""
    case = MatchCase(B=2, N=101, D=D, H=2, r=10, trap=trap)
    _, scores = ops.match_edges(case.metric(), case.r, case.p, device=MANY)
    exact = [oracle.edge_scores(image, case.p)[0].max(1) for image in case.metric()]
    assert np.abs(np.array(scores) - np.concatenate(exact)).max() <= 1e-6


@pytest.mark.parametrize("reduce", ["mean", "sum", "amax"])
@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda c: c.id)
def test_merge(case, reduce):
    x, assign, size, weight = case.x(), case.assign(), case.per_token("size"), case.per_token("weight")
    got = ops.merge(x, assign, case.M, size, weight, reduce=reduce)
    oracle.check_merge(got, x, assign, case.M, size, weight, reduce)


@pytest.mark.parametrize("case", [c for c in MERGE_CASES if c.small and c.C == 24], ids=lambda c: c.id)
def test_merge_does_not_depend_on_the_schedule(case):
    inputs = case.x(), case.assign(), case.M, case.per_token("size"), case.per_token("weight")
    first, *others = [ops.merge(*inputs, seed=seed) for seed in SEEDS]
    for other in others:
        for have, want in zip(other, first, strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("members", [64, 65, 256, 257, 320, 321, 1000])
def test_merge_of_more_members_than_the_list_holds(members):
    """The list is filled 256 tokens at a time and emptied in between; sums stay in index order."""
    case = MergeCase(B=1, N=members + 3, M=2, C=8, kind="one", size="count")
    x, assign, size = case.x(), case.assign(), case.per_token("size")
    assign[:, ::300] = 0
    oracle.check_merge(ops.merge(x, assign, 2, size), x, assign, 2, size)
    wide = x.repeat(1, 1, 40)  # several chunks a warp: the list is made again for each
    out = ops.merge(wide, assign, 2, size)[0]
    assert torch.equal(out, ops.merge(x, assign, 2, size)[0].repeat(1, 1, 40))


@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda c: c.id)
def test_unmerge(case):
    y, assign = case.y(), case.assign()
    assert torch.equal(ops.unmerge(y, assign), reference.unmerge(y, assign))


@pytest.mark.parametrize("case", [c for c in MATCH_CASES if c.r == 9 and not c.weighted], ids=lambda c: c.id)
@pytest.mark.parametrize("device", [H200, MANY], ids=["one-block", "several-blocks"])
def test_match_merge(case, device):
    x, size = case.x(), case.size()
    out, size_out, assign = ops.match_merge(x, case.metric(), case.r, case.p, size, device=device)
    check_match(case, assign)
    oracle.check_merge((out, size_out), x, assign, out.shape[1], size)
