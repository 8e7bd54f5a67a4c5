"""The Triton kernels of topk and topk_gather: in the interpreter against the oracle, and compiled for four GPUs."""

import pytest
import torch
from oracle import same
from topk_cases import TOPK_CASES, TopkCase
from topk_oracle import check_assign, check_gather
from triton_aot import SHARED_LIMIT, TARGETS, compile_for, launches, resources
from triton_interpreter import interpreter


@pytest.fixture(scope="module")
def triton():
    with interpreter() as call:
        yield call


# The interpreter takes 0.2 s a case: every trap once, in float32 but for what depends on the dtype.
FUSED = [c for c in TOPK_CASES if c.small and (c.seed or c.trap in ("random", "odd-values"))]
COPIED = [c for c in TOPK_CASES if not c.small]


@pytest.mark.parametrize("case", FUSED, ids=lambda c: c.id)
def test_topk_gather(case, triton):
    for fuse in ("mean", "sum") if case.trap in ("mixed", "nan", "odd-values") else ("mean",):
        got = triton("topk_gather", case.x(), case.score(), case.k, case.p, fuse=fuse)
        check_gather(got, case.x(), case.score(), case.k, case.p, fuse)


@pytest.mark.parametrize("case", COPIED, ids=lambda c: c.id)
def test_topk_gather_without_a_fused_row(case, triton):
    got = triton("topk_gather", case.x(), case.score(), case.k, case.p)
    check_gather(got, case.x(), case.score(), case.k, case.p, "none")


@pytest.mark.parametrize("trap", ["random", "ties", "inf"])
@pytest.mark.parametrize("fuse", [False, True])
def test_topk_of_several_passes(trap, fuse, triton):
    score = TopkCase(B=2, N=5003, p=3, trap=trap).score()
    check_assign(triton("topk", score, 2000, 3, fuse), score, 2000, 3, fuse)


def test_topk_of_16384_tokens(triton):
    score = TopkCase(B=1, N=16384, trap="ties").score()
    check_assign(triton("topk", score, 5000), score, 5000, 1, False)


def test_the_kernels_are_what_runs(triton):
    case = TopkCase(B=1, N=9, C=3, k=4)
    triton("topk_gather", case.x(), case.score(), case.k, fuse="sum")
    assert list(triton.launched) == ["topk_kernel", "gather_kernel"]


def test_the_others_are_added_in_index_order(triton):
    """1 + 1e8 - 1e8 is 0 in this order and 1 in any other."""
    x = torch.tensor([5.0, 1.0, 7.0, 1e8, -1e8])[None, :, None].expand(-1, -1, 24)
    score = torch.tensor([[9.0, 1.0, 3.0, 1.0, 1.0]])
    for fuse in ("sum", "mean"):
        out, _ = triton("topk_gather", x, score, 1, fuse=fuse)
        assert torch.equal(out[0, :, 7], torch.tensor([5.0, 7.0, 0.0]))


def test_one_image_alone_equals_the_batch(triton):
    case = TopkCase(B=2, trap="ties", dtype=torch.bfloat16)
    batch = triton("topk_gather", case.x(), case.score(), case.k, fuse="mean")
    for b in range(case.B):
        alone = triton("topk_gather", case.x()[b : b + 1], case.score()[b : b + 1], case.k, fuse="mean")
        assert all(same(one, whole[b : b + 1]) for one, whole in zip(alone, batch, strict=True))


def test_float64_and_bad_input_are_refused(triton):
    x, score = torch.zeros(1, 4, 2), torch.zeros(1, 4)
    expected = "must be float32, float16 or bfloat16 on a CUDA device, got float64"
    with pytest.raises(RuntimeError, match=f"^topk: score {expected}"):
        triton("topk", score.double(), 1)
    with pytest.raises(RuntimeError, match=f"^topk_gather: x {expected}"):
        triton("topk_gather", x.double(), score, 1)
    with pytest.raises(RuntimeError, match=r"^topk_gather: k must be at least 0, got -1"):
        triton("topk_gather", x, score, -1)


def _variants() -> list:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):  # float16 compiles alike: benchmarks/static has it
        for fuse in ("sum", "mean"):
            x = torch.zeros(2, 197, 384, dtype=dtype)
            found.update(dict.fromkeys(launches("topk_gather", x, torch.zeros(2, 197), 138, fuse=fuse)))
    found.update(dict.fromkeys(launches("topk_gather", torch.zeros(2, 577, 33), torch.zeros(2, 577), 9, fuse="mean")))
    found.update(dict.fromkeys(launches("topk", torch.zeros(2, 5000), 9)))
    return list(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", _variants(), ids=lambda launch: launch.id)
def test_resources(launch, target):
    got = resources(compile_for(launch, target), target)
    assert got.spills == 0
    assert got.shared <= SHARED_LIMIT[target]
    # A kernel can come out empty without an error.
    assert got.loads >= 1
    assert got.stores >= 1


def test_twelve_lengths_compile_few_variants():
    variants = set()
    for N in range(197, 197 - 12 * 13, -13):
        variants.update(launches("topk_gather", torch.zeros(2, N, 384), torch.zeros(2, N), N // 2, fuse="mean"))
    assert sorted(v.name for v in variants) == ["gather_kernel", "topk_kernel", "topk_kernel", "topk_kernel"]
