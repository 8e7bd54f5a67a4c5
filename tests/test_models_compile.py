"""Patched models under torch.compile, torch.export and fake CUDA tensors."""

import copy
import io

import pytest
import timm
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from vits import METHODS, SHORT, TINY, images, pairs, reduced, tiny

import tokred_kernels as tokred


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs compiled in this test; a backend may be called more often, when a compilation starts again."""
    return counters["stats"]["unique_graphs"]


def patched(name="deit", r=5, **options):
    return tokred.apply(tiny(name, **options), "tome", r=r)


ONE_EACH = [("gap-reg4-nocls", "tome"), ("siglip-map", "tome"), ("gap-reg4-nocls", "topk"), ("distilled", "evit")]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "tome") for name in TINY] + [("gap", "topk"), ("distilled", "evit"), ("cls-reg9", "metr")],
)
def test_the_whole_model_is_one_graph(name, method):
    model = reduced(tiny(name), method)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images()), model(images()))
    assert graphs() == 1


@pytest.mark.parametrize(
    ("name", "method", "backend"),
    [(*pair, "aot_eager") for pair in ONE_EACH] + [(*pair, "eager") for pair in pairs("cls-reg9")],
)
def test_one_dynamic_graph_serves_every_batch(name, method, backend):
    model = reduced(tiny(name, depth=2), method, **SHORT[method])
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5, 3):
            torch.testing.assert_close(compiled(images(batch)), model(images(batch)))
    assert graphs() == 1


@pytest.mark.parametrize(
    ("method", "options"), [("tome", dict(r=[0, 5, 1])), ("evit", dict(keep_rate=0.7, stages=(1, 2)))]
)
def test_one_dynamic_graph_of_the_blocks_serves_every_token_count(method, options):
    """The blocks alone: timm's own embedding takes a graph for each resolution."""
    model = tokred.apply(tiny("deit", depth=3), method, **options)

    def blocks(x):
        size = None
        for block, r in zip(model.blocks, model._schedule(x), strict=True):
            x, size = block(x, size, r)
        return x, size

    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for N in (37, 65, 5):
            x = torch.randn(2, N, 32)
            torch.testing.assert_close(compiled(x), blocks(x))
    assert graphs() == 1


def test_a_compiled_schedule_runs_only_what_it_needs():
    """Where r is known to be 0, nothing reduces in the graph, and where it is 0 throughout, attention is timm's."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(patched(r=[0, 5, 0, 1]), backend=keep, fullgraph=True, dynamic=True)(images())
        torch.compile(
            tokred.apply(tiny("deit"), "evit", **METHODS["evit"]), backend=keep, fullgraph=True, dynamic=True
        )(images())
        torch.compile(
            tokred.apply(tiny("deit"), "topk", keep_rate=1, stages=(1, 3)), backend=keep, fullgraph=True, dynamic=True
        )(images())
    names = ("match", "add_merge_norm", "add_topk_gather_norm", "attention")
    ops = [[graph.code.count(f"tokred.{name}(") for name in names] for graph in graphs]
    assert ops == [[2, 2, 0, 4], [0, 0, 2, 4], [0, 0, 0, 0]]


SCHEDULES = [5, 0, [0, 5, 0, 1], [1, 0, 1, 0], (8, -1), (8, 1), [0, 0, 0, 9], [100, 100, 100, 100], [0, 7, 7, 0]]


@pytest.mark.parametrize(
    "schedules, prop_attn",
    [(SCHEDULES, True), (SCHEDULES[::-1], False), ([[1, 0, 1, 0]], True)],
    ids=["forward", "backward without prop_attn", "r = 1 first"],
)
def test_block_by_block_three_graphs_serve_all_schedules(schedules, prop_attn):
    for r in schedules:
        model = tokred.apply(tiny("deit"), "tome", r=r, prop_attn=prop_attn)
        with torch.no_grad():
            want = [model(images(batch)) for batch in (2, 3)]
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
            got = [model(images(batch)) for batch in (2, 3)]
        torch.testing.assert_close(got, want)
    assert graphs() <= 3


def test_block_by_block_three_graphs_serve_all_stages():
    """Timm's own forward, a block that attends and one that scores too."""
    for options in (
        dict(keep_rate=0.7, stages=(1, 3)),
        dict(keep_rate=1, stages=(1,)),
        dict(tokens=[30, 29, 8, 8]),
        dict(tokens=[1], stages=(3,)),
        dict(tokens=[35], stages=(0,)),
    ):
        model = tokred.apply(tiny("deit"), "evit", **options)
        with torch.no_grad():
            want = [model(images(batch)) for batch in (2, 3)]
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
            got = [model(images(batch)) for batch in (2, 3)]
        torch.testing.assert_close(got, want)
    assert graphs() <= 3


def test_wrapped_blocks_need_two_graphs():
    model = patched("deit", [0, 5, 0, 1])
    with torch.no_grad():
        want = model(images())
        for n, block in enumerate(model.blocks):
            model.blocks[n] = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(model(images()), want)
    assert graphs() == 2


@pytest.mark.parametrize(("name", "method"), ONE_EACH)
def test_compiled_training_gives_the_same_gradients(name, method):
    model = reduced(tiny(name), method).train()
    twin = copy.deepcopy(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(images()).square().sum().backward()
    twin(images()).square().sum().backward()
    for (n, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item() + 1e-8, msg=n)


@pytest.mark.parametrize("method", ["tome", "evit", "dynamicvit"])
def test_compiled_gradient_checkpointing(method):
    model = reduced(tiny("deit", depth=2), method, **SHORT[method])
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing(True)
    torch.compile(model, backend="aot_eager", fullgraph=True)(images()).square().sum().backward()
    twin(images()).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        if b.grad is None:  # DynamicViT's predictors learn in training alone
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item() + 1e-8)


def test_compiled_dense_outputs():
    model = patched("dinov2-reg4")
    compiled = torch.compile(model.forward_intermediates, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        final, grids = model.forward_intermediates(images())
        got_final, got_grids = compiled(images())
    assert torch.equal(got_final, final) and all(torch.equal(a, b) for a, b in zip(got_grids, grids, strict=True))


def test_inductor():
    model = patched("gap-reg4-nocls", depth=2)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "method"), [("siglip-map", "tome"), ("gap-reg4-nocls", "topk"), *pairs("deit")])
def test_export_save_and_load(name, method):
    model = reduced(tiny(name, depth=2), method, **SHORT[method])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.no_grad():
        for n in (2, 5):
            torch.testing.assert_close(loaded(images(n)), model(images(n)))
    ops = [str(node.target) for node in program.graph.nodes]
    for op, times in {"tome": {"match": 2, "merge": 2}, "evit": {"topk_gather": 1}}.get(method, {}).items():
        assert sum(name.startswith(f"tokred.{op}.") for name in ops) == times


def fake_cuda(name, dtype=torch.float32, method="tome"):
    """A patched model on a CUDA device that need not exist: to be called under FakeTensorMode."""
    with unset_fake_temporarily():
        model = reduced(TINY[name](), method)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype, device="cuda"))
        for key, constant in module._buffers.items():
            module._buffers[key] = torch.empty(constant.shape, dtype=constant.dtype, device="cuda")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_fake_cuda_tensors_run_through_the_whole_model(name, dtype):
    with FakeTensorMode(), torch.no_grad():
        model = fake_cuda(name, dtype).eval()
        x = torch.empty(2, 3, 48, 48, device="cuda", dtype=dtype)
        logits = model(x)
        features, size = model._reduce(x, None, False)
        final = model.forward_intermediates(x)[0]
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    assert logits.device.type == "cuda" and logits.dtype == dtype
    assert features.shape[1] == tokens - 4 * 5 and final.shape[1] == tokens
    assert size.dtype == torch.float32 and size.device.type == "cuda"


@pytest.mark.parametrize(("name", "method"), [("map-reg4", "topk"), *pairs("qk_norm")])
def test_fake_cuda_tensors_run_through_a_model_that_selects(name, method):
    with FakeTensorMode(), torch.no_grad():
        model = fake_cuda(name, torch.bfloat16, method).eval()
        x = torch.empty(2, 3, 48, 48, device="cuda", dtype=torch.bfloat16)
        assert model(x).device.type == "cuda"
        with tokred.trace(model) as t:
            model.forward_features(x)
    assert t.tokens[-1] < t.tokens[0] == 36 + model.num_prefix_tokens


def test_timm_factory_models_compile_at_their_real_size():
    model = tokred.apply(timm.create_model("deit_small_patch16_224", depth=2).eval(), "tome", r=13)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(images(1, 224)), model(images(1, 224)))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "method"), pairs(*TINY))
def test_a_cuda_model_is_the_cpu_model(name, method):
    model = reduced(tiny(name), method)
    with torch.no_grad(), tokred.trace(model) as t:
        want = model(images())
    source = t.source
    model.cuda()
    with torch.no_grad(), tokred.trace(model) as t:
        got = model(images().cuda())
    same = (t.source.cpu() == source).all(1)  # a choice closer than rounding may fall either way
    assert same.any()
    torch.testing.assert_close(got.cpu()[same], want[same], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "method"), ONE_EACH)  # Inductor takes half a minute for each
def test_a_compiled_cuda_model_is_the_eager_one(name, method):
    model = reduced(tiny(name), method).cuda()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images().cuda()), model(images().cuda()), rtol=1e-3, atol=1e-3)
