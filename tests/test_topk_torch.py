"""topk and topk_gather inside PyTorch: gradients, opcheck, vmap, fakes, torch.compile with dynamic shapes, export."""

import pytest
import torch
from topk_cases import FUSE, TOPK_CASES
from torch._subclasses.fake_tensor import FakeTensorMode

import tokred_kernels as tokred

ops = torch.ops.tokred


def inputs(dtype=torch.float64, B: int = 2, N: int = 11, seed: int = 0):
    """x, and scores in (0, 1) further apart than gradcheck's steps."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, 3, generator=g, dtype=torch.float64).to(dtype)
    score = torch.stack([torch.randperm(N, generator=g) + 1 for _ in range(B)]) / (N + 1)
    return x.requires_grad_(), score.to(dtype).requires_grad_()


def plain(x, score, k: int, p: int, fuse: str):
    """The definition in differentiable PyTorch, for scores without ties."""
    order = score[:, p:].argsort(1, descending=True) + p
    kept, others = order[:, :k].sort(1).values, order[:, k:].sort(1).values
    rows = [x[:, :p], x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))]
    if fuse != "none" and others.shape[1]:
        w = score.gather(1, others)[..., None]
        if fuse == "mean":
            w = w / w.sum(1, keepdim=True)
        rows.append((w * x.gather(1, others[..., None].expand(-1, -1, x.shape[2]))).sum(1, keepdim=True))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("fuse", FUSE)
@pytest.mark.parametrize("k", [0, 4, 8, 9, 10, 20])
@pytest.mark.parametrize("where", ["cpu", "reference"])
def test_gradients(fuse, k, where):
    x, score = inputs()
    p = 1 if k < 9 else 2
    with tokred.use_backend(where):
        assert torch.autograd.gradcheck(lambda x, s: tokred.topk_gather(x, s, k, p, fuse=fuse)[0], (x, score))
        got = tokred.topk_gather(x, score, k, p, fuse=fuse)[0]
        want = plain(x, score, k, p, fuse)
        torch.testing.assert_close(got, want)
        seed = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
        have = torch.autograd.grad(got, (x, score), seed, allow_unused=True)
        expected = torch.autograd.grad(want, (x, score), seed, allow_unused=True)
    for a, b in zip(have, expected, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_scores_that_sum_to_zero_share_the_gradient_equally():
    """The plain mean does not depend on the scores; nor does an exact copy."""
    x, _ = inputs()
    score = torch.tensor([[9.0, 8, 7, 6, 5, 4, 1, -1, 2, -2, 0]]).expand(2, -1).double().requires_grad_()
    for k, members in ((5, slice(6, 11)), (9, slice(9, 10))):
        out = tokred.topk_gather(x, score, k, 1, fuse="mean")[0]
        grad_x, grad_score = torch.autograd.grad(out[:, -1].sum(), (x, score))
        assert torch.equal(grad_score, torch.zeros_like(score))
        want = torch.zeros_like(x)
        want[:, members] = 1 / (members.stop - members.start)
        torch.testing.assert_close(grad_x, want)


def test_no_gradient_through_the_selection():
    x, score = inputs(torch.float32)
    assert not tokred.topk(score, 3).requires_grad
    out, assign = tokred.topk_gather(x, score, 3)
    assert not assign.requires_grad
    grad_x, grad_score = torch.autograd.grad(out.sum(), (x, score), allow_unused=True)
    assert grad_score is None
    assert torch.equal(grad_x[..., 0], (assign >= 0).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_input(dtype):
    x = inputs(dtype)[0]
    score = inputs(torch.float32)[1]
    out = tokred.topk_gather(x, score, 3, fuse="mean")[0]
    grads = torch.autograd.grad(out.float().square().sum(), (x, score))
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    assert all(g.isfinite().all() for g in grads)


def test_second_order_raises():
    x, score = inputs()
    out = tokred.topk_gather(x, score, 3, fuse="sum")[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(grad, dtype):
    x, score = (t.detach().requires_grad_(grad) for t in inputs(dtype))
    for k in (4, 30):
        torch.library.opcheck(ops.topk.default, (score.detach(), k, 1, True))
        for fuse in FUSE:
            torch.library.opcheck(ops.topk_gather.default, (x, score, k, 2), {"fuse": fuse})


@pytest.mark.parametrize("fuse", FUSE)
@pytest.mark.parametrize("case", [c for c in TOPK_CASES if c.trap == "random"], ids=lambda c: c.id)
def test_fakes_have_the_real_shapes_strides_and_dtypes(case, fuse):
    def both(x, score):
        return *ops.topk_gather(x, score, case.k, case.p, fuse=fuse), ops.topk(score, case.k, case.p)

    real = both(case.x(), case.score())
    with FakeTensorMode() as mode:
        fake = both(mode.from_tensor(case.x()), mode.from_tensor(case.score()))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("fuse", FUSE)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_equals_a_loop(dim, fuse):
    parts = [[t.detach() for t in inputs(torch.float32, seed=seed)] for seed in range(3)]
    x, score = (torch.stack(t, dim) for t in zip(*parts, strict=True))

    def both(x, score):
        return *ops.topk_gather(x, score, 4, 2, fuse=fuse), ops.topk(score, 3)

    mapped = torch.vmap(both, (dim, dim))(x, score)
    looped = [both(*part) for part in parts]
    for i, got in enumerate(mapped):
        assert torch.equal(got, torch.stack([one[i] for one in looped]))


def test_vmap_repeats_what_is_not_mapped():
    x, score = (t.detach() for t in inputs(torch.float32))
    many = torch.stack([x, 2 * x])
    got = torch.vmap(lambda x: ops.topk_gather(x, score, 4, fuse="sum")[0])(many)
    assert torch.equal(got, torch.stack([ops.topk_gather(one, score, 4, fuse="sum")[0] for one in many]))


def step(x, score, k: int):
    fused, assign = ops.topk_gather(x, score, k, fuse="mean")
    return fused, assign, ops.topk_gather(x, score, k)[0], ops.topk(score, k, 0, True), tokred.unmerge(fused, assign)


def test_compile_is_one_graph_for_all_k_and_lengths():
    graphs = 0

    def count(graph, example):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for N, k in ((15, 5), (22, 9), (37, 3), (40, 11)):
        x, score = (t.detach() for t in inputs(torch.float32, N=N))
        for got, want in zip(compiled(x, score, k), step(x, score, k), strict=True):
            assert torch.equal(got, want)
    assert graphs == 1


def test_compile_trains():
    torch._dynamo.reset()
    grads = []
    for f in (step, torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")):
        x, score = inputs(torch.float32)
        sum(t.square().sum() for t in f(x, score, 5) if t.is_floating_point()).backward()
        grads += [x.grad, score.grad]
    torch.testing.assert_close(grads[:2], grads[2:])


def test_export_and_load(tmp_path):
    class Step(torch.nn.Module):
        def forward(self, x, score):
            return step(x, score, 5)

    x, score = (t.detach() for t in inputs(torch.float32))
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(Step(), (x, score), dynamic_shapes={"x": batch, "score": batch})
    torch.export.save(exported, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    x, score = (t.detach() for t in inputs(torch.float32, B=5))
    for got, want in zip(loaded(x, score), step(x, score, 5), strict=True):
        assert torch.equal(got, want)
