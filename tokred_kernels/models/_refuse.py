"""What `apply` does not understand in a timm model, and why."""

from timm.layers import Attention, AttentionPoolLatent, AttentionPoolPrr, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
# By name: importing every timm model for its class would cost seconds.
_WHY = {
    "AttentionRope": "its rotary position embeddings are bound to the grid",
    "DiffAttention": "it subtracts two attention maps",
    "DiffParallelScalingBlock": "attention and MLP run in parallel, with nothing between them to merge",
    "Eva": "its rotary position embeddings are bound to the grid",
    "ParallelScalingBlock": "attention and MLP run in parallel, with nothing between them to merge",
    "ParallelThingsBlock": "its attentions and MLPs run in parallel",
    "ResNet": "it has no tokens",
    "ResPostBlock": "it normalises after its branches",
    "SwinTransformer": "its windows need the full grid",
}


def check_model(model: nn.Module) -> None:
    """Raises ValueError with the reason unless every part of the model is understood."""
    if hasattr(model, "tokred_method"):
        raise ValueError("apply: the model is patched already; remove() first")
    for name, module in model.named_modules():
        wrapped = _wrapped(module)
        if wrapped:
            raise ValueError(f"apply: {name or 'the model'} is {wrapped}; apply first, then compile or wrap")
    known = (VisionTransformer, VisionTransformerDistilled)
    _expect("the model", model, known)
    for index, block in enumerate(model.blocks):
        where = f"blocks.{index}"
        _expect(where, block, (Block,))
        _expect(f"{where}.attn", block.attn, (Attention,))
        if block.attn.gate is not None:
            raise ValueError(f"apply: {where}.attn is gated attention, which is not supported")
        _expect(f"{where}.mlp", block.mlp, (Mlp, GluMlp, SwiGLU))
    if model.attn_pool is not None:
        _expect("attn_pool", model.attn_pool, (AttentionPoolLatent, AttentionPoolPrr))
        if getattr(model.attn_pool, "pos_embed", None) is not None:
            raise ValueError("apply: attn_pool has position embeddings, bound to the grid")


def check_uncompiled(caller: str, model: nn.Module) -> None:
    """Raises ValueError if hooks on the model's modules would not run."""
    if any(_wrapped(module) == "compiled" for module in model.modules()):
        raise ValueError(f"{caller}: the model is compiled; use the uncompiled model")


def _wrapped(module: nn.Module) -> str | None:
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return "compiled"
    for base in type(module).__mro__:
        if base.__name__ in _WRAPPERS:
            return f"wrapped in {base.__name__}"
    return None


def _expect(where: str, module: nn.Module, known: tuple[type, ...]) -> None:
    """Subclasses are refused: their forward may differ."""
    kind = type(module)
    if kind not in known:
        why = next((f" ({_WHY[base.__name__]})" for base in kind.__mro__ if base.__name__ in _WHY), "")
        names = " or ".join(k.__name__ for k in known)
        raise ValueError(f"apply: {where} is {kind.__name__}{why}, supported is timm's {names}")
    if "forward" in vars(module):
        raise ValueError(f"apply: the forward of {where} was replaced, so what it computes is not known")
