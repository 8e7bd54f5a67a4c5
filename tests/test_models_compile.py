"""Patched models under torch.compile, torch.export and fake CUDA tensors."""

import copy
import io

import pytest
import timm
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from vits import TINY, images, tiny

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


@pytest.mark.parametrize("name", TINY)
def test_the_whole_model_is_one_graph(name):
    model = patched(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images()), model(images()))
    assert graphs() == 1


@pytest.mark.parametrize("name", ["gap-reg4-nocls", "siglip-map"])
def test_one_dynamic_graph_serves_every_batch(name):
    model = patched(name, [0, 5, 1], depth=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5, 3):
            torch.testing.assert_close(compiled(images(batch)), model(images(batch)))
    assert graphs() == 1


def test_one_dynamic_graph_of_the_blocks_serves_every_token_count():
    """The blocks alone: timm's own embedding takes a graph for each resolution."""
    model = patched("deit", [0, 5, 1], depth=3)

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
    """Where r is known to be 0, no op is in the graph."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(patched(r=[0, 5, 0, 1]), backend=keep, fullgraph=True, dynamic=True)(images())
    assert len(graphs) == 1 and graphs[0].code.count("tokred.match_merge") == 2


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


def test_wrapped_blocks_need_two_graphs():
    model = patched("deit", [0, 5, 0, 1])
    with torch.no_grad():
        want = model(images())
        for n, block in enumerate(model.blocks):
            model.blocks[n] = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(model(images()), want)
    assert graphs() == 2


@pytest.mark.parametrize("name", ["gap-reg4-nocls", "siglip-map"])
def test_compiled_training_gives_the_same_gradients(name):
    model = patched(name).train()
    twin = copy.deepcopy(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(images()).square().sum().backward()
    twin(images()).square().sum().backward()
    for (n, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item() + 1e-8, msg=n)


def test_compiled_gradient_checkpointing():
    model = patched("gap")
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing(True)
    torch.compile(model, backend="aot_eager", fullgraph=True)(images()).square().sum().backward()
    twin(images()).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item() + 1e-8)


def test_compiled_dense_outputs():
    model = patched("dinov2-reg4")
    compiled = torch.compile(model.forward_intermediates, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        final, grids = model.forward_intermediates(images())
        got_final, got_grids = compiled(images())
    assert torch.equal(got_final, final) and all(torch.equal(a, b) for a, b in zip(got_grids, grids, strict=True))


def test_inductor():
    model = tokred.apply(tiny("gap-reg4-nocls", depth=2), "tome", r=5)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deit", "siglip-map"])
def test_export_save_and_load(name):
    model = patched(name)
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
    assert sum(op.startswith("tokred.match_merge") for op in ops) == 4


def fake_cuda(name, dtype=torch.float32):
    """A patched model on a CUDA device that need not exist: to be called under FakeTensorMode."""
    with unset_fake_temporarily():
        model = tokred.apply(TINY[name](), "tome", r=5)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype, device="cuda"))
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


def test_timm_factory_models_compile_at_their_real_size():
    model = tokred.apply(timm.create_model("deit_small_patch16_224", depth=2).eval(), "tome", r=13)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(images(1, 224)), model(images(1, 224)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_a_cuda_model_is_the_cpu_model(name):
    model = patched(name).double().float()
    with torch.no_grad(), tokred.trace(model) as t:
        want = model(images())
    source = t.source
    model.cuda()
    with torch.no_grad(), tokred.trace(model) as t:
        got = model(images().cuda())
    same = (t.source.cpu() == source).all(1)  # a choice closer than rounding may fall either way
    assert same.any()
    torch.testing.assert_close(got.cpu()[same], want[same], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images().cuda())[same], got[same], rtol=1e-3, atol=1e-3)
