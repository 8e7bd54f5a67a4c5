"""What the ops of a patched block need not do where nothing asks for gradients."""

import contextlib

import torch


def without_autograd() -> contextlib.AbstractContextManager:
    """A context for calls of our ops in inference: torch's autograd layer, which is Python, is not run.

    Under no_grad that layer only passes a call on. That takes 8 us alone and longer amid a model, whose caches hold
    other code. Where gradients are on, and under torch.compile, this context does nothing.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()
