"""DTensor: how the ops run on tensors that are spread over processes. Importing this module registers the rules.

Every op treats the images of a batch apart, so all tensors may be sharded along dimension 0. Attention that emits no
scores also treats its heads apart: q, k, v and what they give may be sharded along dimension 1, sizes replicated.
Anything else is gathered first. The gradients are ops, or torch's own, and follow the same rules.
"""

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .._backend import OPS


def _register(name: str) -> None:
    op = getattr(torch.ops.tokred, name).default
    outputs = len(op._schema.returns)

    @register_sharding(op)
    def rules(*args, scores="none", **_):
        tensors = [arg for arg in args if hasattr(arg, "placements")]
        found = [([Replicate()] * outputs, [Replicate()] * len(tensors))]
        # The weights of a norm [C] are the same for all images.
        found.append(([Shard(0)] * outputs, [Replicate() if t.ndim == 1 else Shard(0) for t in tensors]))
        if name in ("attention", "attention_backward") and scores == "none":
            heads = [Shard(1) if t.ndim == 4 else Replicate() for t in tensors]
            found.append(([Shard(1), Replicate()] if name == "attention" else [Shard(1)] * outputs, heads))
        return found


for _name in OPS:
    _register(_name)
