"""The clustering ops inside PyTorch: what they refuse, opcheck, vmap, fakes, torch.compile, export, no gradient."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from cluster_cases import CLUSTER_CASES, UPDATES, ClusterCase
from torch._subclasses.fake_tensor import FakeTensorMode

import tokred_kernels as tokred

ops = torch.ops.tokred


SMALL = ClusterCase(B=2, N=11, C=6, K=4)


def inputs(case: ClusterCase = SMALL):
    return case.x(), case.density(), case.centres(), case.weight()


def everything(x, density, centres, weight, k=3):
    """Every op once, on the distances of x."""
    distance = ops.pairwise_distance(x, scale=0.5)
    label = ops.nearest(distance, centres)
    moved = [ops.medoids(distance, label, centres, weight, update=u) for u in UPDATES]
    pinned = ops.nearest(distance, centres, pin=True)
    return distance, *ops.knn(distance, k), ops.separation(distance, density), label, pinned, *moved


D = torch.rand(2, 7, 7)
S = torch.ones(2, 7)
R = torch.zeros(2, 7, dtype=torch.int32)
K = torch.zeros(2, 3, dtype=torch.int32)
FLOATS = "float32, float16, bfloat16 or float64"
BAD = {
    "pairwise_distance-rank": (lambda: ops.pairwise_distance(S), "x must be [B, N, C], got [2, 7]"),
    "pairwise_distance-dtype": (lambda: ops.pairwise_distance(D.int()), f"x must be {FLOATS}, got int32"),
    "knn-rank": (lambda: ops.knn(S, 1), "distance must be [B, N, N], got [2, 7]"),
    "knn-shape": (lambda: ops.knn(D[:, 1:], 1), "distance must be [B, N, N], got [2, 6, 7]"),
    "knn-dtype": (lambda: ops.knn(D.long(), 1), f"distance must be {FLOATS}, got int64"),
    "knn-k": (lambda: ops.knn(D, -1), "k must be at least 0, got -1"),
    "separation-shape": (lambda: ops.separation(D[..., 1:], S), "distance must be [B, N, N], got [2, 7, 6]"),
    "separation-dtype": (lambda: ops.separation(D, S.bool()), f"density must be {FLOATS}, got bool"),
    "separation-density": (lambda: ops.separation(D, S[:, 1:]), "density must be [B, N] = [2, 7], got [2, 6]"),
    "nearest-shape": (lambda: ops.nearest(S, K), "distance must be [B, N, N], got [2, 7]"),
    "nearest-rank": (lambda: ops.nearest(D, K[0]), "centres must be int32 [B, K], got [3]"),
    "nearest-dtype": (lambda: ops.nearest(D, K.long()), "centres must be int32 [B, K] = [2, 3], got int64 [2, 3]"),
    "nearest-batch": (lambda: ops.nearest(D, K[:1]), "centres must be int32 [B, K] = [2, 3], got [1, 3]"),
    "medoids-shape": (lambda: ops.medoids(S, R, K, S), "distance must be [B, N, N], got [2, 7]"),
    "medoids-label-dtype": (
        lambda: ops.medoids(D, R.long(), K, S),
        "label must be int32 [B, N] = [2, 7], got int64 [2, 7]",
    ),
    "medoids-label-shape": (lambda: ops.medoids(D, K, K, S), "label must be int32 [B, N] = [2, 7], got [2, 3]"),
    "medoids-centres": (lambda: ops.medoids(D, R, K[:1], S), "centres must be int32 [B, K] = [2, 3], got [1, 3]"),
    "medoids-weight": (lambda: ops.medoids(D, R, K, S[:, 1:]), "weight must be [B, N] = [2, 7], got [2, 6]"),
    "medoids-weight-dtype": (lambda: ops.medoids(D, R, K, S.int()), f"weight must be {FLOATS}, got int32"),
    "medoids-update": (
        lambda: ops.medoids(D, R, K, S, update="mean"),
        'update must be "textbook" or "wttu", got "mean"',
    ),
}


@pytest.mark.parametrize("where", ["cpu", "reference", "fake"])
@pytest.mark.parametrize("name", BAD)
def test_refused(name, where):
    call, message = BAD[name]
    within = FakeTensorMode(allow_non_fake_inputs=True) if where == "fake" else tokred.use_backend(where)
    with within, pytest.raises(RuntimeError) as raised:
        call()
    assert str(raised.value) == f"{name.split('-')[0]}: {message}"


def test_refuses_a_mix_of_devices_and_what_is_not_dense():
    with pytest.raises(RuntimeError, match="nearest: centres must be on meta, got cpu"):
        tokred.nearest(D.to("meta"), K)
    with pytest.raises(RuntimeError, match="separation: density must be on meta, got cpu"):
        tokred.separation(D.to("meta"), S)
    for op, argument, call in [
        ("pairwise_distance", "x", tokred.pairwise_distance),
        ("knn", "distance", lambda t: tokred.knn(t, 1)),
        ("nearest", "distance", lambda t: tokred.nearest(t, K)),
    ]:
        with pytest.raises(RuntimeError, match=f"{op}: {argument} must be a dense tensor, got layout torch.sparse_coo"):
            call(D.to_sparse())


def test_what_is_no_centre_or_cluster_is_an_error_under_debug():
    code = """
import torch, tokred_kernels as tokred
def first(n): return torch.tensor([[n, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
distance, weight = torch.rand(1, 7, 7), torch.ones(1, 7)
for call in (lambda t: tokred.nearest(distance, t), lambda t: tokred.medoids(distance, t, first(-1), weight)):
    call(first(-1))
    for bad in (-2, 7, 2**31 - 1, -(2**31)):
        try:
            call(first(bad))
        except RuntimeError as error:
            print(str(error).splitlines()[0])
"""
    env = {**os.environ, "TOKRED_DEBUG": "1"}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == [
        f"{what} must be in [-1, {bound}) = [-1, 7) under TOKRED_DEBUG=1, got {bad}"
        for what, bound in (("nearest: centres", "N"), ("medoids: label", "K"))
        for bad in (-2, 7, 2**31 - 1, -(2**31))
    ]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(grad, dtype):
    x, density, centres, weight = inputs()
    distance = tokred.pairwise_distance(x).to(dtype)
    label = tokred.nearest(distance, centres)
    for t in (x, density, weight, distance):
        t.requires_grad_(grad)
    torch.library.opcheck(ops.pairwise_distance.default, (x,), {"scale": 0.5})
    for k in (3, 30):
        torch.library.opcheck(ops.knn.default, (distance, k))
    torch.library.opcheck(ops.separation.default, (distance, density))
    torch.library.opcheck(ops.nearest.default, (distance, centres), {"pin": True})
    torch.library.opcheck(ops.medoids.default, (distance, label, centres, weight), {"update": "wttu"})


def test_no_gradient():
    x, density, centres, weight = inputs()
    given = x.requires_grad_(), density.requires_grad_(), centres, weight.requires_grad_()
    assert not any(t.requires_grad for t in everything(*given))


@pytest.mark.parametrize("case", [c for c in CLUSTER_CASES if c.trap == "random"], ids=lambda c: c.id)
def test_fakes_have_the_real_shapes_strides_and_dtypes(case):
    real = everything(*inputs(case), k=case.k)
    with FakeTensorMode() as mode:
        fake = everything(*(mode.from_tensor(t) for t in inputs(case)), k=case.k)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_equals_a_loop(dim):
    parts = [inputs(dataclasses.replace(SMALL, seed=seed)) for seed in range(3)]
    stacked = [torch.stack(t, dim) for t in zip(*parts, strict=True)]
    mapped = torch.vmap(everything, (dim,) * 4)(*stacked)
    looped = [everything(*part) for part in parts]
    for i, got in enumerate(mapped):
        assert torch.equal(got, torch.stack([one[i] for one in looped]))


def test_compile_is_one_graph_for_all_lengths():
    graphs = 0

    def count(graph, example):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=count)
    for N, K in ((15, 5), (22, 9), (37, 3), (40, 11)):
        given = inputs(ClusterCase(N=N, K=K, C=6))
        for got, want in zip(compiled(*given), everything(*given), strict=True):
            assert torch.equal(got, want)
    assert graphs == 1


def test_export_and_load(tmp_path):
    class Step(torch.nn.Module):
        def forward(self, x, density, centres, weight):
            return everything(x, density, centres, weight)

    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(Step(), inputs(), dynamic_shapes=(batch,) * 4)
    torch.export.save(exported, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    given = inputs(dataclasses.replace(SMALL, B=5))
    for got, want in zip(loaded(*given), everything(*given), strict=True):
        assert torch.equal(got, want)
