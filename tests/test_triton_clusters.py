"""The Triton kernels of the clustering ops: in the interpreter against the oracle, and compiled for four GPUs."""

import pytest
import torch
from cluster_cases import CLUSTER_CASES, UPDATES, ClusterCase
from cluster_oracle import check_knn, check_medoids, check_nearest, check_pairwise, check_separation
from oracle import same
from triton_aot import SHARED_LIMIT, TARGETS, compile_for, launches, resources
from triton_interpreter import interpreter

from tokred_kernels.triton import _launch


@pytest.fixture(scope="module")
def triton():
    with interpreter() as call:
        yield call


# The interpreter takes 0.1 s a case: every trap once, dtypes and strides, the empty ones.
SMALL = [c for c in CLUSTER_CASES if c.small and (c.seed or c.trap == "random")]
SHORT = [c for c in SMALL if c.C in (3, 5, 24, 65, 0) and c.trap not in ("all-nan", "copies", "hostile")]


@pytest.mark.parametrize("case", SHORT, ids=lambda c: c.id)
def test_pairwise_distance(case, triton):
    check_pairwise(triton("pairwise_distance", case.x(), scale=case.scale), case.x(), case.scale)


COMPARED = [c for c in SMALL if c.C in (3, 5, 24)]


@pytest.mark.parametrize("case", COMPARED, ids=lambda c: c.id)
def test_the_others(case, triton):
    d, density, centres = case.distance(), case.density(), case.centres()
    check_knn(triton("knn", d, case.k), d, case.k)
    check_separation(triton("separation", d, density), d, density)
    for pin in (False, True):
        check_nearest(triton("nearest", d, centres, pin=pin), d, centres, pin)
    for update in UPDATES:
        got = triton("medoids", d, case.label(), centres, case.weight(), update=update)
        check_medoids(got, d, case.label(), centres, case.weight(), update)


def test_more_tokens_than_a_tile_has_columns(triton):
    """260 distances of a row, of which 4 are not in the first round; ties across the rounds; 260 centres."""
    N = 260
    d = torch.randint(0, 3, (1, 1, N), generator=torch.Generator().manual_seed(0)).float().expand(1, N, N)
    centres = torch.arange(N, dtype=torch.int32).flip(0)[None]
    label, weight = torch.arange(N, dtype=torch.int32)[None] // 258, torch.ones(1, N)
    check_knn(triton("knn", d, 3), d, 3)
    density = torch.zeros(1, N)
    check_separation(triton("separation", d, density), d, density)
    check_nearest(triton("nearest", d, centres), d, centres, False)
    check_medoids(triton("medoids", d, label, centres, weight), d, label, centres, weight, "textbook")


def test_one_image_alone_equals_the_batch(triton):
    case = ClusterCase(B=2, trap="ties", dtype=torch.bfloat16)
    batch = triton("pairwise_distance", case.x())
    assert all(same(triton("pairwise_distance", case.x()[b : b + 1]), batch[b : b + 1]) for b in range(case.B))


def test_float64_and_bad_input_are_refused(triton):
    d = torch.zeros(1, 4, 4)
    rows, weight = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4)
    calls = {"knn": (2,), "separation": (weight,), "nearest": (rows,), "medoids": (rows, rows, weight)}
    expected = "must be float32, float16 or bfloat16 on a CUDA device, got float64"
    for op, others in calls.items():
        with pytest.raises(RuntimeError, match=f"^{op}: distance {expected}"):
            triton(op, d.double(), *others)
        with pytest.raises(RuntimeError, match=rf"^{op}: distance must be \[B, N, N\], got \[1, 3, 4\]"):
            triton(op, d[:, 1:], *others)
    with pytest.raises(RuntimeError, match=f"^pairwise_distance: x {expected}"):
        triton("pairwise_distance", d.double())


def test_debug_refuses_what_is_no_centre(monkeypatch):
    monkeypatch.setattr(_launch, "_DEBUG", True)
    centres = torch.tensor([[0, 3, -1]], dtype=torch.int32)
    _launch.refuse_stray_rows("nearest", centres, 4, "centres", "N")
    with pytest.raises(RuntimeError, match=r"^nearest: centres must be in \[-1, N\) = \[-1, 3\) under .*, got 3"):
        _launch.refuse_stray_rows("nearest", centres, 3, "centres", "N")


def _variants() -> list:
    found = {}
    for N, K in ((196, 137), (60, 20), (576, 403)):
        d, rows = torch.zeros(2, N, N), torch.zeros(2, N, dtype=torch.int32)
        centres = torch.zeros(2, K, dtype=torch.int32)
        found.update(dict.fromkeys(launches("pairwise_distance", torch.zeros(2, N, 384))))
        found.update(dict.fromkeys(launches("knn", d, 5)))
        found.update(dict.fromkeys(launches("separation", d, torch.zeros(2, N))))
        for pin in (False, True):
            found.update(dict.fromkeys(launches("nearest", d, centres, pin=pin)))
        for update in UPDATES:
            found.update(dict.fromkeys(launches("medoids", d, rows, centres, torch.zeros(2, N), update=update)))
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
    for N in range(196, 196 - 12 * 13, -13):
        variants.update(launches("knn", torch.zeros(2, N, N), 5))
        variants.update(launches("nearest", torch.zeros(2, N, N), torch.zeros(2, N // 2, dtype=torch.int32)))
    assert len(variants) <= 2 * 2 * 3  # tiles of 64 and 128; none, one or both strides divisible by 16
