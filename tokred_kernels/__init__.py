"""Token reduction for vision transformers, with kernels so good that the reduction costs nothing.

    import timm, tokred_kernels as tokred
    model = tokred.apply(timm.create_model("deit_small_patch16_224").eval(), "tome", r=13)

Ops: add_merge_norm, add_topk_gather_norm, attention, attention_scores, match, match_merge, merge, topk, topk_gather,
unmerge; for clusters: knn, medoids, nearest, pairwise_distance, separation. Each is also torch.ops.tokred.*.
Models: apply, remove, trace; load_published, load_metr; add_exits, exit_logits, remove_exits; two_passes;
policy_logits. Losses and the training itself: training. Schedules and MACs: schedule.
Fixed and random partitions beside match: partition. Patterns compared: analysis. Backends: info, use_backend.
"""

import importlib

from ._backend import info, use_backend
from .ops import (
    add_merge_norm,
    add_topk_gather_norm,
    attention,
    attention_scores,
    knn,
    match,
    match_merge,
    medoids,
    merge,
    nearest,
    pairwise_distance,
    separation,
    topk,
    topk_gather,
    unmerge,
)
from .trace import trace  # eagerly: imported later, the module of that name would hide the function

__version__ = "0.1.0"
__all__ = [
    "add_exits",
    "add_merge_norm",
    "add_topk_gather_norm",
    "analysis",
    "apply",
    "attention",
    "attention_scores",
    "exit_logits",
    "info",
    "knn",
    "load_metr",
    "load_published",
    "match",
    "match_merge",
    "medoids",
    "merge",
    "nearest",
    "pairwise_distance",
    "partition",
    "policy_logits",
    "remove",
    "remove_exits",
    "schedule",
    "separation",
    "topk",
    "topk_gather",
    "trace",
    "training",
    "two_passes",
    "unmerge",
    "use_backend",
]

# These need timm, which takes seconds to import: on first use.
_LAZY = {
    "add_exits": "models.metr",
    "apply": "models.timm",
    "exit_logits": "models.metr",
    "load_metr": "models.published",
    "load_published": "models.published",
    "policy_logits": "models.dynamicvit",
    "remove": "models.timm",
    "remove_exits": "models.metr",
    "two_passes": "models.mctf",
}


def __getattr__(name: str):
    if name in ("analysis", "partition", "schedule", "training"):
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
