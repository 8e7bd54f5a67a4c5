"""The public functions. Each module is the contract of one op: docstring, fake, autograd and vmap rule."""

from .add_merge_norm import add_merge_norm
from .add_topk_gather_norm import add_topk_gather_norm
from .attention import attention
from .attention_scores import attention_scores
from .knn import knn
from .match import match
from .match_merge import match_merge
from .medoids import medoids
from .merge import merge
from .nearest import nearest
from .pairwise_distance import pairwise_distance
from .separation import separation
from .topk import topk
from .topk_gather import topk_gather
from .unmerge import unmerge

__all__ = [
    "add_merge_norm",
    "add_topk_gather_norm",
    "attention",
    "attention_scores",
    "knn",
    "match",
    "match_merge",
    "medoids",
    "merge",
    "nearest",
    "pairwise_distance",
    "separation",
    "topk",
    "topk_gather",
    "unmerge",
]
