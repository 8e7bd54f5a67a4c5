"""The clustering ops on the CPU, by every instruction set and by the reference, against the brute-force oracle."""

import torch
from cases import ISAS, by_id
from cluster_cases import CLUSTER_CASES, UPDATES, ClusterCase, with_float64
from cluster_oracle import check_knn, check_medoids, check_nearest, check_pairwise, check_separation
from oracle import same

import tokred_kernels as tokred

DEIT = ClusterCase(B=8, N=196, C=384, K=137)
# What comparing alone decides does not depend on the channels.
COMPARED = [c for c in with_float64(CLUSTER_CASES) if c.C in (24, 3, 5) or c.N > 100]


def unchanged(*tensors):
    """A check, for later, that these still hold what they hold now."""
    before = [t.clone() for t in tensors]
    return lambda: all(same(a, b) for a, b in zip(tensors, before, strict=True))


@by_id(with_float64([c for c in CLUSTER_CASES if c.trap not in ("all-nan", "copies", "hostile")]))
def test_pairwise_distance(case, backend, poisoned):
    x = case.x()
    intact = unchanged(x)
    check_pairwise(tokred.pairwise_distance(x, scale=case.scale), x, case.scale)
    assert intact()


@by_id(COMPARED)
def test_knn_and_separation(case, backend, poisoned):
    distance, density = case.distance(), case.density()
    intact = unchanged(distance, density)
    check_knn(tokred.knn(distance, case.k), distance, case.k)
    check_separation(tokred.separation(distance, density), distance, density)
    assert intact()


@by_id(COMPARED)
def test_nearest_and_medoids(case, backend, poisoned):
    distance, centres, label, weight = case.distance(), case.centres(), case.label(), case.weight()
    intact = unchanged(distance, centres, label, weight)
    for pin in (False, True):
        check_nearest(tokred.nearest(distance, centres, pin=pin), distance, centres, pin)
    for update in UPDATES:
        got = tokred.medoids(distance, label, centres, weight, update=update)
        clear = check_medoids(got, distance, label, centres, weight, update)
        assert clear > 0 or case.trap != "random" or case.K in (0, 90) or case.B * case.N == 0
    assert intact()


def everything(x, density, centres, weight):
    """Every op once, on the distances of x."""
    distance = tokred.pairwise_distance(x, scale=0.5)
    label = tokred.nearest(distance, centres)
    moved = [tokred.medoids(distance, label, centres, weight, update=u) for u in UPDATES]
    return distance, *tokred.knn(distance, 5), tokred.separation(distance, density), label, *moved


def test_one_image_alone_equals_the_batch(backend):
    given = DEIT.x(), DEIT.density(), DEIT.centres(), DEIT.weight()
    batch = everything(*given)
    for b in (0, 3, 7):
        alone = everything(*(t[b : b + 1] for t in given))
        assert all(same(one, whole[b : b + 1]) for one, whole in zip(alone, batch, strict=True))


def test_bitwise_equal_over_threads_and_runs(backend):
    given = DEIT.x(), DEIT.density(), DEIT.centres(), DEIT.weight()
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 5):
            torch.set_num_threads(n)
            results.append(everything(*given))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], again, strict=True))


def test_equal_tokens_have_equal_rows_wherever_they_sit(backend):
    """In the same tile, in others, in the tiles that are mirrored, in the last rows."""
    x = torch.randn(1, 83, 70, generator=torch.Generator().manual_seed(0))
    copies = [0, 1, 15, 16, 33, 47, 64, 80, 82]
    x[:, copies] = x[:, :1].clone()
    distance = tokred.pairwise_distance(x)
    assert (distance[:, copies] == distance[:, :1]).all() and (distance[:, :, copies] == distance[:, :, :1]).all()
    assert not distance[:, copies][:, :, copies].any()


def test_the_error_is_at_most_twice_that_of_pytorch():
    """Of torch.cdist without its matrix product, which cancels."""
    x = DEIT.x()
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")

    def error(distance):
        return (distance / exact - 1).nan_to_num().abs().max()

    theirs = error(torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"))
    for isa in ISAS:
        try:
            with tokred.use_backend("cpu", isa=isa):
                assert error(tokred.pairwise_distance(x)) <= 2 * theirs
        except RuntimeError:
            continue  # not on this processor


def test_products_are_added_in_float64(backend):
    """1 + 1e8 - 1e8 is 0 in float32; the tie with a cost of exactly 0.5 must not go to the first."""
    distance = torch.zeros(1, 4, 4)
    distance[0, 0] = torch.tensor([0.0, 1.0, 1e8, -1e8])
    distance[0, 1:, 0] = 0.5
    centres, weight = torch.tensor([[3]], dtype=torch.int32), torch.ones(1, 4)
    assert tokred.medoids(distance, torch.zeros(1, 4, dtype=torch.int32), centres, weight).tolist() == [[1]]


def test_offsets_past_2_to_the_31(backend):
    """Rows 2^30 elements apart: memory of which only the rows themselves are ever touched."""
    far = 2**30
    for make in (lambda d: tokred.pairwise_distance(d.half()), lambda d: tokred.knn(d, 2)[1]):
        d = torch.empty(3 * far + 64, dtype=torch.float32).as_strided((1, 4, 4), (0, far, 1))
        d.copy_(torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)))
        assert same(make(d), make(d.clone()))
