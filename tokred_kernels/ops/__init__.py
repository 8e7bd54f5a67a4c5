"""The public functions. Each module is the contract of one op: docstring, fake, autograd and vmap rule."""

from .match import match
from .match_merge import match_merge
from .merge import merge
from .unmerge import unmerge

__all__ = ["match", "match_merge", "merge", "unmerge"]
