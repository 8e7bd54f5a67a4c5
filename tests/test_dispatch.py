"""The ops inside PyTorch: opcheck, vmap, fakes, torch.compile with dynamic shapes, export, backends."""

import subprocess
import sys

import pytest
import torch
from cases import MATCH_CASES, MERGE_CASES, TWO_WAY_CASES
from torch._subclasses.fake_tensor import FakeTensorMode

import tokred_kernels as tokred
from tokred_kernels._backend import OPS, TRITON_ONLY

ops = torch.ops.tokred


def tensors(seed: int = 0, B: int = 2, N: int = 15):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, 6, generator=g)
    k = torch.randn(B, 2, N, 8, generator=g)
    size = torch.randint(1, 5, (B, N), generator=g).float()
    assign = torch.randint(-1, 5, (B, N), generator=g, dtype=torch.int32)
    return x, k, size, assign


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(grad, dtype):
    x, k, size, assign = tensors()
    x, k = x.to(dtype).requires_grad_(grad), k.to(dtype)
    weight = torch.rand(2, 15).requires_grad_(grad)
    samples = {
        ops.match.default: [((k, 4), {}), ((k[:, 0], 0, 2, size), {"power": 2.0}), ((k, 5), {"two_way": True})],
        ops.merge.default: [((x, assign, 5, size), {"reduce": r}) for r in ("mean", "sum", "amax")]
        + [((x, assign, 5, None, weight), {"reduce": r}) for r in ("mean", "sum")],
        ops.unmerge.default: [((x, assign), {})],
        ops.match_merge.default: [((x, k, 4, 1, size), {}), ((x, k, 0), {})],
    }
    for op, calls in samples.items():
        for args, kwargs in calls:
            torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("case", MATCH_CASES, ids=lambda c: c.id)
def test_fakes_have_the_real_shapes_strides_and_dtypes(case):
    args = (case.x(), case.metric(), case.r, case.p, case.size())
    real = ops.match_merge(*args)
    with FakeTensorMode() as mode:
        fake = ops.match_merge(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("case", TWO_WAY_CASES[::10], ids=lambda c: c.id)
def test_fakes_of_match_two_way(case):
    real = ops.match(case.metric(), case.r, case.p, two_way=True)
    with FakeTensorMode() as mode:
        fake = ops.match(mode.from_tensor(case.metric()), case.r, case.p, two_way=True)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda c: c.id)
def test_fakes_of_merge_and_unmerge(case):
    x, y, assign, size = case.x(), case.y(), case.assign(), case.per_token("size")
    real = [*ops.merge(x, assign, case.M, size), ops.unmerge(y, assign)]
    with FakeTensorMode() as mode:
        x, y, assign, size = (None if t is None else mode.from_tensor(t) for t in (x, y, assign, size))
        fake = [*ops.merge(x, assign, case.M, size), ops.unmerge(y, assign)]
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_fakes_on_cuda_without_a_gpu():
    with FakeTensorMode():
        x, k = torch.empty(2, 15, 6, device="cuda", dtype=torch.bfloat16), torch.empty(2, 2, 15, 8, device="cuda")
        out, size, assign = ops.match_merge(x, k, 4)
        assert {t.device.type for t in (out, size, assign, ops.unmerge(out, assign))} == {"cuda"}
        assert (out.shape, out.dtype, size.dtype) == ((2, 11, 6), torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_equals_a_loop(dim):
    parts = [tensors(seed) for seed in range(3)]
    x, k, size, assign = (torch.stack(t, dim) for t in zip(*parts, strict=True))
    dims = (dim, dim, dim, dim)

    def everything(x, k, size, assign):
        merged = ops.match_merge(x, k, 4, 1, size)
        others = ops.merge(x, assign, 5, size, size, reduce="sum"), ops.unmerge(x, assign), ops.match(k, 3, 2, size)
        return *merged, *others[0], *others[1:], ops.match(k, 5, 1, size, two_way=True)

    mapped = torch.vmap(everything, dims)(x, k, size, assign)
    looped = [everything(*part) for part in parts]
    for i, got in enumerate(mapped):
        assert torch.equal(got, torch.stack([one[i] for one in looped]))


def test_vmap_repeats_what_is_not_mapped():
    x, k, size, _ = tensors()
    many = torch.stack([x, 2 * x])
    got = torch.vmap(lambda x: ops.match_merge(x, k, 4, 1, size)[0])(many)
    assert torch.equal(got, torch.stack([ops.match_merge(one, k, 4, 1, size)[0] for one in many]))


def step(x, k, size, r: int):
    out, size, assign = ops.match_merge(x, k, r, 1, size)
    back = ops.unmerge(out, assign)
    largest, _ = ops.merge(back + x, assign, out.shape[1], None, None, reduce="amax")
    return largest, size, ops.match(k, r), ops.match(k, r, two_way=True)


def test_compile_is_one_graph_for_all_shapes():
    graphs = 0

    def count(graph, example):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for N in (15, 22, 37, 40):
        x, k, size, _ = tensors(N=N)
        for got, want in zip(compiled(x, k, size, 5), step(x, k, size, 5), strict=True):
            assert torch.equal(got, want)
    assert graphs == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_trains(backend):
    torch._dynamo.reset()
    x, k, size, _ = tensors()
    grads = []
    for f in (step, torch.compile(step, fullgraph=True, dynamic=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        f(leaf, k, size, 5)[0].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_export_and_load(tmp_path):
    class Step(torch.nn.Module):
        def forward(self, x, k, size):
            return step(x, k, size, 5)

    x, k, size, _ = tensors()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "k": {0: batch}, "size": {0: batch}}
    torch.export.save(torch.export.export(Step(), (x, k, size), dynamic_shapes=shapes), tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    x, k, size, _ = tensors(B=5)
    for got, want in zip(loaded(x, k, size), step(x, k, size, 5), strict=True):
        assert torch.equal(got, want)


def test_use_backend_selects_and_restores():
    x, k, _, _ = tensors()
    before = tokred.info()
    seen = {}
    for name in ("reference", "cpu"):
        with tokred.use_backend(name), torch.profiler.profile() as profile:
            ops.match_merge(x, k, 4)
        seen[name] = any("argmax" in event.name or "sort" in event.name for event in profile.events())
    assert seen == {"reference": True, "cpu": False}  # the reference is made of PyTorch's ops
    with tokred.use_backend("cpu", isa="portable"):
        assert tokred.info()["match"]["cpu"] == "cpu (portable)"
        with tokred.use_backend("reference"):
            assert tokred.info()["match"]["cpu"] == "reference"
        assert tokred.info()["match"]["cpu"] == "cpu (portable)"
    assert tokred.info() == before


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: tokred.use_backend("tpu"), ValueError, "name must be one of reference, cpu, cuda, triton, got 'tpu'"),
        (
            lambda: tokred.use_backend("cpu", isa="mmx"),
            RuntimeError,
            "cpu_isa: name must be one of .*portable.*, got mmx",
        ),
        (lambda: tokred.use_backend("triton", isa="avx2"), ValueError, "isa is for the backend cpu"),
    ],
)
def test_use_backend_refuses(call, error, message):
    before = tokred.info()
    with pytest.raises(error, match=message), call():
        pass
    assert tokred.info() == before


def test_every_op_has_a_kernel_on_cuda_and_info_names_it():
    """An op without a CUDA C++ form is Triton's also where _cuda is loaded."""
    found = tokred.info()
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokred::{op}", "CUDA"), op
    built = "triton" if "cuda" in found["reasons"] else "cuda"
    assert {op: found[op]["cuda"] for op in OPS} == {
        **dict.fromkeys(OPS, built),
        **dict.fromkeys(TRITON_ONLY, "triton"),
    }


def run(code: str, **env: str) -> str:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    ).stdout


def test_import_brings_neither_timm_nor_triton_nor_a_driver():
    code = "import sys, torch\nbefore = set(sys.modules)\nimport tokred_kernels\n"
    code += "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
    code += "print(sorted(new & {'timm', 'triton', 'torchvision', 'rich', 'matplotlib', 'sklearn'}))\n"
    code += "print(torch.cuda.is_initialized())"
    assert run(code).split("\n")[:2] == ["[]", "False"]


def test_backend_is_chosen_by_the_environment():
    code = "import tokred_kernels as t; print(t.info()['match']['cpu'])"
    assert run(code, TOKRED_BACKEND="reference").strip() == "reference"
    assert run(code, TOKRED_BACKEND="").strip().startswith("cpu (")
