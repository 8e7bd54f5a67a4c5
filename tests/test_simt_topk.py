"""The CUDA kernels of topk and topk_gather on the host, by the emulator in simt/, over the shared cases."""

import pytest
import torch
from oracle import same
from simt import ops
from topk_cases import FUSE, TOPK_CASES, TopkCase
from topk_oracle import check_assign, check_gather

SEEDS = (0, 1, 2)  # 0: threads in order


def run(case: TopkCase, fuse: str, **kwargs):
    return ops.topk_gather(case.x(), case.score(), case.k, case.p, fuse=fuse, **kwargs)


@pytest.mark.parametrize("case", TOPK_CASES, ids=lambda c: c.id)
def test_topk_gather(case):
    """The dtypes share the code of the selection and of the copies, so one of them takes every mode."""
    for fuse in FUSE if case.dtype == torch.float32 else ("mean",):
        check_gather(run(case, fuse), case.x(), case.score(), case.k, case.p, fuse)


@pytest.mark.parametrize("case", [c for c in TOPK_CASES if c.small and c.k == 20], ids=lambda c: c.id)
def test_the_schedule_does_not_matter(case):
    first, *others = [run(case, "mean", seed=seed) for seed in SEEDS]
    assert all(same(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("trap", ["random", "ties", "inf"])
@pytest.mark.parametrize("k", [0, 3000, 9000])
def test_topk_of_more_patches_than_threads(trap, k):
    case = TopkCase(B=1, N=9001, k=k, p=2, trap=trap)
    check_assign(ops.topk(case.score(), k, 2, True), case.score(), k, 2, True)


def test_topk_of_16384_tokens():
    case = TopkCase(B=1, N=16384, k=5000, trap="ties")
    check_assign(ops.topk(case.score(), case.k), case.score(), case.k, 1, False)


@pytest.mark.parametrize("others", [64, 65, 256, 257, 320, 321, 1000])
def test_more_others_than_the_list_holds(others):
    """The list is filled 256 tokens at a time and emptied in between; sums stay in index order."""
    case = TopkCase(B=1, N=others + 4, C=40, k=3)
    for fuse in ("sum", "mean"):
        check_gather(run(case, fuse), case.x(), case.score(), case.k, case.p, fuse)
    case = TopkCase(B=1, N=others + 4, C=5, k=3, trap="zero")  # the plain mean: the list is made again
    check_gather(run(case, "mean"), case.x(), case.score(), case.k, case.p, "mean")


def test_the_others_are_added_in_index_order():
    """1 + 1e8 - 1e8 is 0 in this order and 1 in any other."""
    x = torch.tensor([5.0, 1.0, 7.0, 1e8, -1e8])[None, :, None].expand(-1, -1, 24)
    score = torch.tensor([[9.0, 1.0, 3.0, 1.0, 1.0]])
    for fuse in ("sum", "mean"):
        assert torch.equal(ops.topk_gather(x, score, 1, fuse=fuse)[0][0, :, 7], torch.tensor([5.0, 7.0, 0.0]))


def test_an_image_is_that_of_the_batch():
    case = TopkCase(B=3, N=101, C=40, k=60, trap="ties")
    whole = run(case, "sum")
    for b in range(case.B):
        x, score = case.x()[b : b + 1], case.score()[b : b + 1]
        alone = ops.topk_gather(x, score, case.k, fuse="sum")
        assert all(same(a, t[b : b + 1]) for a, t in zip(alone, whole, strict=True))
