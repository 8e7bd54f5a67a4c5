"""The public functions. Each module is the contract of one op: docstring, fake, autograd and vmap rule."""

from .attention import attention
from .attention_scores import attention_scores
from .match import match
from .match_merge import match_merge
from .merge import merge
from .topk import topk
from .topk_gather import topk_gather
from .unmerge import unmerge

__all__ = [
    "attention",
    "attention_scores",
    "match",
    "match_merge",
    "merge",
    "topk",
    "topk_gather",
    "unmerge",
]
