"""The CUDA kernels of attention on the host, by the emulator in simt/: against the oracle, over cases and schedules."""

import attention_oracle as oracle
import pytest
import torch
from attention_cases import ATTENTION_CASES, AttentionCase, _varied
from cases import DTYPES
from simt import counting, ops

SEEDS = (0, 1, 2)  # 0: threads in order
ONE, MANY = (1, 0), (100_000, 0)  # multiprocessors

HALF = DTYPES[1:]
# Every bucket and every chunk of the kernels, and one beside; ATTENTION_CASES has the traps.
TILE_CASES = [
    *[_varied(B=1, H=1, N=n, Nq=20, D=64, dtype=d) for n in (111, 112, 113, 128, 129, 207, 208, 209) for d in HALF],
    *[_varied(B=1, H=1, N=n, Nq=20, D=40, dtype=torch.bfloat16) for n in (1, 16, 17, 196, 255, 256, 257, 300)],
    *[AttentionCase(B=1, H=3, N=n, Nq=m, D=64, size_kind="zeros", scores=s, dtype=torch.float16)
      for n, m in ((197, 65), (256, 17), (260, 130)) for s in ("none", "cls", "mean")],
    AttentionCase(B=1, H=1, N=577, Nq=70, D=64, size_kind="counts", scores="mean", dtype=torch.bfloat16),
    # Column sums beside streamed keys: a block's 128 or 64 query rows, its 128 or 64 keys, fewer blocks than tiles.
    *[AttentionCase(B=1, H=1, N=n, Nq=m, D=24, size_kind="zeros", scores="mean", dtype=d)
      for d in (torch.bfloat16, torch.float32)
      for n, m in ((63, 127), (64, 128), (65, 129), (127, 63), (128, 64), (129, 65), (65, 390), (1, 257), (193, 1))],
    *[AttentionCase(B=1, H=1, N=n, Nq=m, D=8, scores="mean", size_kind="counts")
      for n, m in ((1024, 1024), (1025, 1089))],
    # The traps over several chunks.
    *[AttentionCase(B=2, H=1, N=150, D=24, size_kind=s, trap=t, scores=e, dtype=d, seed=5)
      for s, t in (*(("zeros", t) for t in ("garbage", "nan-q", "nan-k", "inf-q", "inf-k", "no-mass", "late-mass")),
                   *((s, "garbage") for s in ("masked", "image-masked", "first-masked", "one-left", "late", "early")),
                   ("large", "rising"), ("large", "falling"))
      for e, d in (("cls", torch.bfloat16), ("mean", torch.bfloat16), ("mean", torch.float32))],
]  # fmt: skip
CASES = [c for c in ATTENTION_CASES if c.B * c.H * c.queries * c.N * c.D <= 8_000_000] + TILE_CASES


def run(case: AttentionCase, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.attention(*case.qkv(), case.size(), **case.keywords, **kwargs)


def assert_same(got, want) -> None:
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_attention(case):
    oracle.check(case, *run(case))


@pytest.mark.parametrize("case", [c for c in CASES if c.scores != "none" and c.small], ids=lambda c: c.id)
def test_attention_scores(case):
    q, k, _ = case.qkv()
    oracle.check_scores(ops.attention_scores(q, k, case.size(), **case.keywords), case)


@pytest.mark.parametrize("scores", ["none", "cls", "mean"])
@pytest.mark.parametrize("D, dtype", [(64, torch.bfloat16), (24, torch.float16), (40, torch.float32)])
def test_nothing_depends_on_the_schedule_the_batch_or_the_device(D, dtype, scores):
    """A device with more multiprocessors than heads has their query rows shared out between blocks."""
    case = AttentionCase(B=2, H=1, N=131, D=D, dtype=dtype, scores=scores, size_kind="zeros")
    first, *others = [run(case, seed=seed) for seed in SEEDS]
    for other in others:
        assert_same(other, first)
    assert_same(run(case, device=MANY), first)
    assert_same(run(case, device=ONE), first)
    q, k, v = case.qkv()
    size = case.size()
    for b in range(case.B):
        image = slice(b, b + 1)
        alone = ops.attention(q[image], k[image], v[image], size[image], scores=scores)
        assert_same(alone, [t[image] for t in first])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows_are_those_of_aligned_ones(dtype):
    """A start, and a stride, that 16 bytes do not divide: loads of an element each."""
    case = AttentionCase(N=40, H=2, D=24, dtype=dtype, layout="contiguous")
    shifted = []
    for t in case.qkv():
        wide = torch.full((*t.shape[:3], t.shape[3] + 1), torch.nan, dtype=dtype)
        wide[..., 1:] = t
        shifted.append(wide[..., 1:])
    assert_same(ops.attention(*shifted, scores="mean"), ops.attention(*case.qkv(), scores="mean"))


@pytest.mark.parametrize("N, Nq", [(9, 17), (65, 17), (65, 300), (209, 17), (300, 130)])
@pytest.mark.parametrize("scores", ["cls", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_memory_stays_within_its_bound(N, Nq, scores, dtype):
    case = AttentionCase(B=1, N=N, Nq=Nq, D=64, dtype=dtype)
    *_, scratch = ops.attention_and_scratch(*case.qkv(), scores=scores)
    assert 0 < scratch <= 4 * case.H * N * -(-min(N, 1024) // 64)


@pytest.mark.parametrize("scores", ["cls", "mean"])
@pytest.mark.parametrize("D, dtype", [(64, torch.bfloat16), (24, torch.float16), (40, torch.float32)])
def test_at_most_two_launches(D, dtype, scores):
    q, k, v = AttentionCase(B=1, N=300, D=D, dtype=dtype).qkv()
    assert len(counting.launches("attention", q, k, v, share=0, scores=scores)) == 2
    assert len(counting.launches("attention_scores", q, k, share=0, scores=scores)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_many_keys(dtype):
    """The running sum over 65 chunks, the last one nearly empty. A rescaling of it that is not exactly 1 where the
    maximum stays would add up."""
    case = AttentionCase(B=1, H=1, N=4097, Nq=19, D=32, dtype=dtype, size_kind="counts", scores="mean")
    oracle.check(case, *run(case))
