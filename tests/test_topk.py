"""topk and topk_gather on the CPU, by every instruction set and by the reference, against the brute-force oracle."""

import pytest
import torch
from cases import by_id
from oracle import same
from topk_cases import FUSE, TOPK_CASES, TopkCase, with_float64
from topk_oracle import check_assign, check_gather

import tokred_kernels as tokred


@pytest.mark.parametrize("fuse", [False, True], ids=["drop", "fuse"])
@by_id(TOPK_CASES)
def test_topk(case, fuse, backend, poisoned):
    score = case.score()
    before = score.clone()
    assign = tokred.topk(score, case.k, case.p, fuse)
    check_assign(assign, score, case.k, case.p, fuse)
    assert same(score, before)


@pytest.mark.parametrize("fuse", FUSE)
@by_id(with_float64(TOPK_CASES))
def test_topk_gather(case, fuse, backend, poisoned):
    x, score = case.x(), case.score()
    before = x.clone(), score.clone()
    got = tokred.topk_gather(x, score, case.k, case.p, fuse=fuse)
    check_gather(got, x, score, case.k, case.p, fuse)
    assert same(x, before[0]) and same(score, before[1])
    storages = {t.untyped_storage().data_ptr() for t in (x, score) if t.numel()}
    assert not storages & {t.untyped_storage().data_ptr() for t in got if t.numel()}


@by_id([c for c in TOPK_CASES if c.B > 1 and c.p == 1])
def test_one_image_alone_equals_the_batch(case, backend):
    x, score = case.x(), case.score()
    batch = tokred.topk_gather(x, score, case.k, case.p, fuse="mean")
    for b in range(case.B):
        alone = tokred.topk_gather(x[b : b + 1], score[b : b + 1], case.k, case.p, fuse="mean")
        assert all(same(one, whole[b : b + 1]) for one, whole in zip(alone, batch, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_equal_over_threads_and_runs(dtype, backend):
    case = TopkCase(B=8, N=197, C=384, k=138, dtype=dtype)
    x, score = case.x(), case.score()
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 5):
            torch.set_num_threads(n)
            results.append([t for fuse in FUSE for t in tokred.topk_gather(x, score, case.k, fuse=fuse)])
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("N", [16_384, 20_001])
def test_many_tokens(N, backend):
    case = TopkCase(B=1, N=N, C=5, k=N // 3, trap="ties")
    for fuse in FUSE:
        check_gather(
            tokred.topk_gather(case.x(), case.score(), case.k, fuse=fuse), case.x(), case.score(), case.k, 1, fuse
        )


@pytest.mark.parametrize("wide", [1, 5, 70])  # a tail, a vector, several
def test_the_others_are_added_in_index_order(wide, backend):
    """1 + 1e8 - 1e8 is 0 in this order and 1 in any other."""
    x = torch.tensor([5.0, 1.0, 7.0, 1e8, -1e8])[None, :, None].expand(-1, -1, wide)
    score = torch.tensor([[9.0, 1.0, 3.0, 1.0, 1.0]])
    for fuse in ("sum", "mean"):
        out, _ = tokred.topk_gather(x, score, 1, fuse=fuse)
        assert torch.equal(out[0, :, 0], torch.tensor([5.0, 7.0, 0.0]))


def test_scores_that_differ_beyond_float32_tie(backend):
    """They are read as float32 with a float32 x, and as float64 with a float64 one or by topk, which has no x."""
    score = 1 + 1e-12 * torch.arange(6.0, dtype=torch.float64)[None]
    x = torch.randn(1, 6, 3)
    assert tokred.topk_gather(x, score, 2, 0)[1].tolist() == [[0, 1, -1, -1, -1, -1]]
    assert tokred.topk_gather(x.double(), score, 2, 0)[1].tolist() == [[-1, -1, -1, -1, 0, 1]]
    assert tokred.topk(score, 2, 0).tolist() == [[-1, -1, -1, -1, 0, 1]]


def test_offsets_past_2_to_the_31(backend):
    """Rows 2^30 elements apart: memory of which only the rows themselves are ever touched."""
    far = 2**30
    x = torch.empty(3 * far + 64, dtype=torch.bfloat16).as_strided((1, 4, 16), (0, far, 1))
    x.copy_(torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)))
    score = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    for k in (1, 2, 3):
        got, want = (tokred.topk_gather(t, score, k, fuse="sum") for t in (x, x.clone()))
        assert all(same(a, b) for a, b in zip(got, want, strict=True))
