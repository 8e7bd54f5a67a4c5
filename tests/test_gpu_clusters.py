"""The Triton kernels of the clustering ops on a device, over the shared cases: CUDA C++ has no form of them."""

import pytest
import torch
from cases import by_id
from cluster_cases import CLUSTER_CASES, UPDATES, ClusterCase
from cluster_oracle import check_knn, check_medoids, check_nearest, check_pairwise, check_separation
from oracle import all_same, same

import tokred_kernels as tokred

pytestmark = pytest.mark.gpu

DEIT = ClusterCase(B=8, N=196, C=384, K=137, dtype=torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def backend():
    with tokred.use_backend("triton"):
        yield


def inputs(case: ClusterCase) -> list[torch.Tensor]:
    return [case.x("cuda"), case.density("cuda"), case.centres("cuda"), case.weight("cuda")]


def step(x, density, centres, weight) -> tuple[torch.Tensor, ...]:
    """Every op once, on the distances of x."""
    distance = tokred.pairwise_distance(x, scale=0.5)
    label = tokred.nearest(distance, centres, pin=True)
    moved = [tokred.medoids(distance, label, centres, weight, update=u) for u in UPDATES]
    return distance, *tokred.knn(distance, 5), tokred.separation(distance, density), label, *moved


@by_id([c for c in CLUSTER_CASES if c.trap not in ("all-nan", "copies", "hostile")])
def test_pairwise_distance(case, poisoned):
    x = case.x("cuda")
    before = x.clone()
    check_pairwise(tokred.pairwise_distance(x, scale=case.scale), x, case.scale)
    assert same(x, before)


@by_id([c for c in CLUSTER_CASES if c.C in (24, 3, 5) or c.N > 100])
def test_the_others(case, poisoned):
    d, density, centres = case.distance("cuda"), case.density("cuda"), case.centres("cuda")
    label, weight = case.label("cuda"), case.weight("cuda")
    before = [t.clone() for t in (d, density, centres, label, weight)]
    check_knn(tokred.knn(d, case.k), d, case.k)
    check_separation(tokred.separation(d, density), d, density)
    for pin in (False, True):
        check_nearest(tokred.nearest(d, centres, pin=pin), d, centres, pin)
    for update in UPDATES:
        check_medoids(tokred.medoids(d, label, centres, weight, update=update), d, label, centres, weight, update)
    assert all_same((d, density, centres, label, weight), before)


def test_runs_and_batches_are_bitwise_equal():
    given = inputs(DEIT)
    first = step(*given)
    assert all_same(step(*given), first)
    for b in (0, 3, 7):
        assert all_same(step(*(t[b : b + 1] for t in given)), [t[b : b + 1] for t in first])


def test_graph_capture_and_replay():
    given = [t.clone() for t in inputs(DEIT)]
    want = step(*[t.flip(0) for t in given])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given)  # nothing waits for the device
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*given)
    for t in given:
        t.copy_(t.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all_same(got, want)
