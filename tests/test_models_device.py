"""No host in the way of a patched model: proven on fake CUDA tensors, and on a device where there is one."""

import pytest
import torch
from test_models_compile import fake_cuda
from torch._dynamo.utils import counters
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vits import METHODS, images, reduced, tiny

# What waits for the device, or has a shape that only the device knows; fake tensors refuse some of them too.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


class OnDevice(TorchDispatchMode):
    """Refuses every op that waits for the device or that copies between it and the host; a number is an argument."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in WAITING, f"{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        # Numbers travel with the launch; torch's checkpointing marks its place with an empty tensor.
        on_host = [t for t in tensors if not t.is_cuda and t.dim() > 0 and t.numel() > 0]
        assert not on_host, f"{name} has tensors on the host"
        return result


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_leaves_the_device(method, train):
    with fake_tensor.FakeTensorMode(), torch.set_grad_enabled(train):
        model = fake_cuda("deit", torch.bfloat16, method).train(train)
        x = torch.empty(2, 3, 48, 48, device="cuda", dtype=torch.bfloat16)
        with OnDevice():
            assert model(x).is_cuda


@pytest.mark.parametrize(
    "leave", [lambda x: x.cpu(), lambda x: torch.ones(3).cuda(), lambda x: x.sum().item(), lambda x: x[x > 0]]
)
def test_what_leaves_the_device_is_seen(leave):
    refused = (AssertionError, fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    with fake_tensor.FakeTensorMode(), OnDevice(), pytest.raises(refused):
        leave(torch.empty(3, device="cuda"))


def on_device(method: str, device: str = "cuda"):
    return reduced(tiny("deit"), method).to(device), images().to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_captured_model_replays_bit_equal(method):
    model, x = on_device(method)
    others = [images(seed=seed).to("cuda") for seed in (2, 3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = [model(other) for other in others]  # every kernel is loaded and nothing waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = model(x)
    for other, logits in zip(others, want, strict=True):
        x.copy_(other)
        graph.replay()
        assert torch.equal(got, logits)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_reduce_overhead_is_one_graph(method):
    torch._dynamo.reset()
    counters.clear()
    model, x = on_device(method)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # compiles, records, replays
        got = compiled(x).clone()
    torch.testing.assert_close(got, model(x), rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_streams_do_not_meet(method):
    """Two forwards at a time, each on its stream: on the default one they would read images that are not there yet."""
    model, x = on_device(method)
    y = images(seed=2).to("cuda")
    want = [model(x), model(y)]
    late = [torch.zeros_like(x), torch.zeros_like(y)]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream, target, source in zip(streams, late, (x, y), strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            target.copy_(source)
            got.append(model(target))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_second_gpu(method):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    model, x = on_device(method)
    want = model(x)
    got = model.to("cuda:1")(x.to("cuda:1"))
    assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), want.cpu())
