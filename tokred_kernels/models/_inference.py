"""What a patched block need not do: autograd where nothing asks for gradients, and modules that do nothing."""

import contextlib

import torch
from torch import Tensor, nn


def through(x: Tensor, *modules: nn.Module) -> Tensor:
    """x through the modules in turn, but for those that would pass it on as it is: a block of timm's has eight, and the
    host pays for each call."""
    for module in modules:
        if not is_idle(module):
            x = module(x)
    return x


def is_idle(module: nn.Module) -> bool:
    """Whether it passes its input on as it is, and nobody watches."""
    kind = type(module)
    if kind is not nn.Identity and (module.training or kind is not nn.Dropout):
        return False
    return not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether it has hooks, which must see what goes in and comes out."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)


def without_autograd() -> contextlib.AbstractContextManager:
    """A context for calls of our ops in inference: torch's autograd layer, which is Python, is not run.

    Under no_grad that layer only passes a call on. That takes 8 us alone and longer amid a model, whose caches hold
    other code. Where gradients are on, and under torch.compile, this context does nothing.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()
