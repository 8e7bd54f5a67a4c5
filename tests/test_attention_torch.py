"""The attention ops inside PyTorch: opcheck, vmap, fakes, autocast, torch.compile with dynamic shapes, export."""

import pytest
import torch
from attention_cases import ATTENTION_CASES, AttentionCase
from oracle import same
from torch._subclasses.fake_tensor import FakeTensorMode

import tokred_kernels as tokred

ops = torch.ops.tokred


def inputs(seed: int = 0, N: int = 15, B: int = 2, dtype=torch.float32) -> tuple:
    """q, k, v, size."""
    case = AttentionCase(B=B, N=N, D=8, size_kind="zeros", dtype=dtype, seed=seed)
    return *case.qkv(), case.size()


def assert_same(tensors, others) -> None:
    assert all(same(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize(
    "scores, dtype", [("none", torch.float64), ("cls", torch.bfloat16), ("mean", torch.float32)], ids=str
)
def test_opcheck(scores, dtype):
    q, k, v, size = inputs(dtype=dtype)
    out, emitted = ops.attention(q, k, v, size, scores=scores)
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    keywords = {"scale": 0.5, "scores": scores}
    torch.library.opcheck(ops.attention.default, (*given, size), keywords)
    torch.library.opcheck(ops.attention_backward.default, (out, emitted, q, k, v, out, size), keywords)
    if scores == "none":
        torch.library.opcheck(ops.attention.default, (q[:, :, :1], k, v), {})
        torch.library.opcheck(ops.attention_backward.default, (None, None, q, k, v, out), {})
    else:
        torch.library.opcheck(ops.attention_scores.default, (*given[:2], size), keywords)


@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.small and c.trap == "normal"], ids=lambda c: c.id)
def test_fakes_have_the_real_shapes_strides_and_dtypes(case):
    q, k, v, size = *case.qkv(), case.size()
    scores = "cls" if case.scores == "none" else case.scores

    def call(q, k, v, size, grad_out, grad_scores):
        results = ops.attention(q, k, v, size, **case.keywords)
        grads = ops.attention_backward(grad_out, grad_scores, q, k, v, results[0], size, **case.keywords)
        return *results, *grads, ops.attention_scores(q, k, size, scores=scores)

    given = q, k, v, size, *case.grads()
    with FakeTensorMode() as mode:
        fake = call(*(None if t is None else mode.from_tensor(t) for t in given))
    for a, b in zip(call(*given), fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_fakes_on_cuda_without_a_gpu():
    with FakeTensorMode():
        q, k = (torch.empty(2, 3, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 15))
        size = torch.empty(2, 15, device="cuda")
        out, scores = ops.attention(q, k, k, size, scores="cls")
        grads = ops.attention_backward(out, scores, q, k, k, out, size, scores="cls")
        assert {t.device.type for t in (out, scores, *grads, ops.attention_scores(q, k))} == {"cuda"}
        assert (out.shape, out.dtype, scores.dtype) == ((2, 3, 1, 64), torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_equals_a_loop(dim):
    parts = [inputs(seed) for seed in range(3)]
    many = [torch.stack(t, min(dim, t[0].dim())) for t in zip(*parts, strict=True)]

    def everything(q, k, v, size):
        out, scores = ops.attention(q, k, v, size, scores="cls")
        grads = ops.attention_backward(out, None, q, k, v, out, size, scores="mean")
        return out, scores, *grads, ops.attention_scores(q, k, size, scores="mean")

    mapped = torch.vmap(everything, (dim,) * 4)(*many)
    for i, got in enumerate(mapped):
        assert torch.equal(got, torch.stack([everything(*part)[i] for part in parts]))


def test_vmap_repeats_what_is_not_mapped():
    q, k, v, size = inputs()
    many = torch.stack([q, 2 * q])
    got = torch.vmap(lambda q: ops.attention(q, k, v, size, scores="mean"))(many)
    for a, b in zip(
        got, zip(*[ops.attention(one, k, v, size, scores="mean") for one in many], strict=True), strict=True
    ):
        assert torch.equal(a, torch.stack(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_queries_keys_and_values_but_not_sizes(dtype):
    q, k, v, size = inputs()
    size = size * 1001  # no half holds them
    with torch.autocast("cpu", dtype):
        got = ops.attention(q, k, v, size, scores="mean")
        mixed = ops.attention(q.to(dtype), k, v.double().float(), size, scores="mean")
    want = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), size, scores="mean")
    assert_same(got, want)
    assert_same(mixed, want)
    assert not same(got[1], ops.attention(*(t.to(dtype) for t in (q, k, v, size)), scores="mean")[1])  # it can tell


def test_autocast_leaves_float64_alone():
    q, k, v, size = inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(ops.attention(q, k, v, size), ops.attention(q, k, v, size))
        assert ops.attention(q, k, v)[0].dtype == torch.float64


def test_gradients_under_autocast_have_the_dtype_of_their_leaf():
    q, k, v, size = inputs()
    q = q.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, scores = ops.attention(q, k, v, size, scores="cls")
    assert (out.dtype, scores.dtype) == (torch.bfloat16, torch.float32)
    (grad,) = torch.autograd.grad(out.float().sum() + scores.square().sum(), q)
    assert grad.dtype == torch.float32 and grad.isfinite().all()


class Block(torch.nn.Module):
    """The attention of a ViT block, as a model calls it."""

    def __init__(self, H: int = 2, D: int = 8):
        super().__init__()
        self.H, self.D = H, D
        self.qkv, self.proj = torch.nn.Linear(H * D, 3 * H * D), torch.nn.Linear(H * D, H * D)

    def forward(self, x, size):
        q, k, v = self.qkv(x).unflatten(2, (3, self.H, self.D)).permute(2, 0, 3, 1, 4).unbind(0)
        out, scores = tokred.attention(q, k, v, size, scores="cls")
        others = tokred.attention_scores(q, k, size, scores="mean")
        return x + self.proj(out.transpose(1, 2).flatten(2)), scores + others


def block_inputs(N: int = 15, B: int = 2) -> tuple:
    g = torch.Generator().manual_seed(N)
    return torch.randn(B, N, 16, generator=g), torch.randint(0, 4, (B, N), generator=g).float()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compile_is_one_graph_for_all_shapes(autocast):
    graphs = 0

    def count(graph, example):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        for N in (15, 22, 37, 40):
            for got, want in zip(compiled(*block_inputs(N)), block(*block_inputs(N)), strict=True):
                assert torch.equal(got, want)
    assert graphs == 1


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compile_trains(autocast):
    torch._dynamo.reset()
    block = Block()
    x, size = block_inputs()
    grads = []
    for f in (block, torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, scores = f(x, size)
        loss = y.float().square().mean() + scores.square().sum()
        grads.append(torch.autograd.grad(loss, list(block.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_export_and_load(tmp_path):
    block = Block().eval()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=4096)}
    program = torch.export.export(block, block_inputs(), dynamic_shapes={"x": sizes, "size": sizes})
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    given = block_inputs(N=33, B=5)
    for got, want in zip(loaded(*given), block(*given), strict=True):
        assert torch.equal(got, want)
