"""Whole models: dense, reduced, in plain PyTorch, and the oracles; verified first, then timed."""

import functools

import pytest
import timm
import torch

from tokred_kernels.cli import variants
from tokred_kernels.cli.timing import graphed

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
VARIANTS = ("dense", "oracle", "oracle_masked", "tome", "plain_sdpa", "plain_explicit")


@functools.lru_cache(maxsize=1)
def _variants(name: str, B: int, device: str):
    """The variants of a model and its input, verified."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batch = torch.randn(B, 3, 224, 224)
    if device == "cuda":
        model, batch = model.to(device, torch.bfloat16), batch.to(device, torch.bfloat16)
    found = variants.build(model, "tome", r=13)
    checked = variants.verify(found, "tome", batch, B)
    assert checked["passed"], f"the results disagree: {checked}"
    return found, batch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("model", MODELS)
def bench_model(benchmark, model, B, device, variant):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    found, batch = _variants(model, B, device)
    forward = functools.partial(found[variant], batch)
    benchmark.group = f"{model} tome r=13 B={B} {device}"
    if device == "cuda":
        replay = graphed(forward)
        benchmark(lambda: (replay(), torch.cuda.synchronize()))
    else:
        benchmark.pedantic(forward, rounds=5, warmup_rounds=1)
