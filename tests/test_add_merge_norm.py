"""add_merge_norm: bit for bit the two steps before its norm, and the norm against float64."""

import pytest
import torch
from cases import MERGE_CASES
from norm_oracle import EPS, affine, branch_of, check_norm, check_rows, check_steps, scaled
from timm.models.vision_transformer import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from vits import images, tiny

import tokred_kernels as tokred
from tokred_kernels import reference
from tokred_kernels.models.baselines import shared_copy

op = torch.ops.tokred.add_merge_norm
CASES = [case for case in MERGE_CASES if case.weight == "none"]


def inputs(case, is_affine: bool = True):
    x = case.x()
    weight, bias = affine(case.C) if is_affine else (None, None)
    return x, branch_of(x), case.assign(), case.M, weight, bias, case.per_token("size")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_equals_the_steps(case, backend, poisoned):
    given = x, branch, assign, m, weight, bias, size = inputs(case)
    before = [t.clone() for t in given if isinstance(t, torch.Tensor)]
    out, size_out, normed = op(*given, eps=EPS)
    check_steps((out, size_out), tokred.merge(x + branch, assign, m, size))
    check_norm(normed, out, weight, bias)
    for kept, t in zip(before, (t for t in given if isinstance(t, torch.Tensor)), strict=True):
        torch.testing.assert_close(t, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("given", ["both", "scale", "bias"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.trap == "normal" and c.size in ("none", "count")], ids=lambda c: c.id
)
def test_a_branch_with_scale_and_bias(case, given, backend, poisoned):
    x, branch, assign, m, *norm, size = inputs(case)
    scale, bias = scaled(case.C, torch.float32, case.dtype)
    scale, bias = None if given == "bias" else scale, None if given == "scale" else bias
    out, size_out, normed = op(x, branch, assign, m, *norm, size, scale, bias, eps=EPS)
    check_rows(out, lambda y: reference.merge(y, assign, m, size)[0], x, branch, scale, bias)
    assert torch.equal(size_out, reference.merge(x, assign, m, size)[1])
    check_norm(normed, out, *norm)


@pytest.mark.parametrize("case", [c for c in CASES if c.small and c.C != 1], ids=lambda c: c.id)
def test_agrees_with_the_reference(case):
    # Of one channel there is nothing but rounding to normalise.
    for is_affine in (True, False):
        given = inputs(case, is_affine)
        for a, b in zip(op(*given), reference.add_merge_norm(*given), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_images_and_threads_do_not_matter():
    x, branch, assign, m, weight, bias, size = inputs(CASES[0])
    size = torch.ones(assign.shape) if size is None else size
    whole = op(x, branch, assign, m, weight, bias, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    again = op(x, branch, assign, m, weight, bias, size)
    torch.set_num_threads(threads)
    for b in range(len(x)):
        one = (slice(b, b + 1),)
        alone = op(x[one], branch[one], assign[one], m, weight, bias, size[one])
        for a, c, d in zip(whole, alone, again, strict=True):
            assert torch.equal(a[one], c) and torch.equal(a, d)


def small(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(2, 9, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(5, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assign = torch.randint(-1, 5, (2, 9), generator=g, dtype=torch.int32)
    return x, branch, assign, 6, weight, bias, torch.randint(1, 4, (2, 9), generator=g).double()


def scaled_rows() -> tuple[torch.Tensor, ...]:
    return tuple(t.requires_grad_() for t in scaled(5, torch.float64, torch.float64))


@pytest.mark.parametrize("outputs", [(0,), (2,), (0, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients(outputs, affine):
    x, branch, assign, m, weight, bias, size = small()
    leaves = (x, branch, weight, bias) if affine else (x, branch)

    def run(x, branch, weight=None, bias=None):
        results = op(x, branch, assign, m, weight, bias, size, eps=1e-3)
        return tuple(results[i] for i in outputs)

    if not affine or 2 in outputs:
        assert torch.autograd.gradcheck(run, leaves)
    else:
        grads = torch.autograd.grad(run(*leaves)[0].sum(), leaves, allow_unused=True)
        assert grads[2] is None and grads[3] is None and torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "scale", "bias"])
def test_gradients_of_scale_and_bias(which):
    x, branch, assign, m, *norm, size = small()
    rows = [row if there else None for row, there in zip(scaled_rows(), which, strict=True)]

    def run(x, branch, *leaves):
        left = iter(leaves)
        given = [None if row is None else next(left) for row in rows]
        out, _, normed = op(x, branch, assign, m, *norm, size, *given, eps=1e-3)
        return out, normed

    assert torch.autograd.gradcheck(run, (x, branch, *(row for row in rows if row is not None)))
    x, branch = x.detach(), branch.detach()
    given = tuple(row for row in rows if row is not None)
    assert all(g.shape == (5,) for g in torch.autograd.grad(run(x, branch, *given)[0].sum(), given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_and_fake(dtype):
    args = small(dtype)
    torch.library.opcheck(op.default, args)
    torch.library.opcheck(op.default, (*args, *scaled_rows()))
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_vmap():
    x, branch, assign, m, weight, bias, _ = (t.detach() if isinstance(t, torch.Tensor) else t for t in small())
    xs = torch.stack([x, 2 * x])
    got = torch.vmap(lambda x: op(x, branch, assign, m, weight, bias))(xs)
    for i, each in enumerate(xs):
        for a, b in zip(got, op(each, branch, assign, m, weight, bias), strict=True):
            assert torch.equal(a[i], b)
    scale = torch.stack([weight, 2 * weight])
    with pytest.raises(NotImplementedError, match="norm_weight"):
        torch.vmap(lambda w: op(x, branch, assign, m, w, bias))(scale)
    with pytest.raises(NotImplementedError, match="branch_scale"):
        torch.vmap(lambda s: op(x, branch, assign, m, weight, bias, None, s))(scale)
    got = torch.vmap(lambda x: op(x, branch, assign, m, weight, bias, None, scale[1], bias))(xs)
    assert torch.equal(got[0][1], op(xs[1], branch, assign, m, weight, bias, None, scale[1], bias)[0])


class Recorded(TorchDispatchMode):
    """The arguments of every call of an op."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op.default, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.calls.append((*args, *[None] * 9)[:9])
        return func(*args, **(kwargs or {}))


class TestInTheModel:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=5)
        return tokred.apply(model.eval(), "tome", r=9)

    @staticmethod
    def calls(model, images, context=torch.inference_mode) -> tuple[int, torch.Tensor]:
        with context(), torch.profiler.profile(acc_events=True) as profile:
            logits = model(images)
        return sum(event.name == "tokred::add_merge_norm" for event in profile.events()), logits

    def test_runs_in_inference_alone_and_changes_little(self, model):
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        fused, logits = self.calls(model, pixels)
        training, want = self.calls(model, pixels, torch.enable_grad)
        assert (fused, training) == (3, 0)
        torch.testing.assert_close(logits, want)

    def test_layer_scale_is_a_part_of_it(self):
        model = tokred.apply(tiny("deit3"), "tome", r=5)
        with torch.inference_mode(), Recorded(op) as seen:
            got = model(images())
        assert len(seen.calls) == 4
        for args, block in zip(seen.calls, model.blocks, strict=True):
            assert args[7] is block.ls1.gamma
        torch.testing.assert_close(got, model(images()))  # with gradients: its steps
        scaled = []
        model.blocks[1].ls1.register_forward_hook(lambda *_: scaled.append(1))
        with torch.inference_mode(), Recorded(op) as seen:
            torch.testing.assert_close(model(images()), got)
        assert scaled == [1] and [args[7] is None for args in seen.calls] == [False, True, False, False]

    def test_a_hook_on_the_norm_still_runs(self, model):
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        seen = []
        model.blocks[1].norm2.register_forward_hook(lambda *_: seen.append(1))
        assert self.calls(model, pixels)[0] == 2 and seen == [1]

    @pytest.mark.parametrize("change", ["another", "replaced"])
    def test_a_norm_that_is_not_known_is_called(self, model, change):
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        model = shared_copy(model)
        norm = model.blocks[0].norm2
        if change == "another":
            model.blocks[0].norm2 = torch.nn.Identity()
        else:
            norm.normalized_shape = (7,)
            norm.forward = lambda x: x
        assert self.calls(model, pixels)[0] == 2
