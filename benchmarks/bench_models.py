"""Whole models: dense, reduced, in plain PyTorch, and the oracles; verified first, then timed."""

import functools

import pytest
import timm
import torch

from tokred_kernels.cli import variants
from tokred_kernels.cli.timing import graphed

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
METHODS = {"tome": {"r": 13}, "evit": {"keep_rate": 0.7}}
VARIANTS = ("dense", "oracle", "oracle_self", "reduced", "plain_sdpa", "plain_explicit")


@functools.lru_cache(maxsize=1)
def _variants(name: str, method: str, B: int, device: str):
    """The variants of a model and its input, verified."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batch = torch.randn(B, 3, 224, 224)
    if device == "cuda":
        model, batch = model.to(device, torch.bfloat16), batch.to(device, torch.bfloat16)
    found = variants.build(model, method, **METHODS[method])
    checked = variants.verify(found, method, batch, B)
    assert checked["passed"], f"the results disagree: {checked}"
    return found, batch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def bench_model(benchmark, model, method, B, device, variant):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    found, batch = _variants(model, method, B, device)
    forward = functools.partial(found[method if variant == "reduced" else variant], batch)
    benchmark.group = f"{model} {method} B={B} {device}"
    if device == "cuda":
        replay = graphed(forward)
        benchmark(lambda: (replay(), torch.cuda.synchronize()))
    else:
        benchmark.pedantic(forward, rounds=5, warmup_rounds=1)
