"""The methods of `apply`. A new one is one file and one line in METHODS."""

import dataclasses

from ._method import Method
from ._staged import BeforeBlock, Staged
from .ats import ATS
from .dpcknn import DPCKNN
from .dynamicvit import DynamicViT
from .evit import EViT
from .kmedoids import KMedoids
from .mctf import MCTF
from .metr import METR
from .patchmerger import PatchMerger
from .radial import Radial
from .sinkhorn import Sinkhorn
from .sit import SiT
from .tome import ToMe
from .topk import TopK

__all__ = ["METHODS", "BeforeBlock", "Method", "Staged", "create"]

METHODS: dict[str, type[Method]] = {
    "tome": ToMe,
    "topk": TopK,
    "evit": EViT,
    "metr": METR,
    "mctf": MCTF,
    "radial": Radial,
    "dynamicvit": DynamicViT,
    "kmedoids": KMedoids,
    "dpcknn": DPCKNN,
    "sit": SiT,
    "patchmerger": PatchMerger,
    "sinkhorn": Sinkhorn,
    "ats": ATS,
}


def create(name: str, options: dict) -> Method:
    """The method with its options.

    Raises:
        ValueError: unknown method, unknown, missing or bad option.
    """
    if name not in METHODS:
        raise ValueError(f"apply: unknown method {name!r}; there is {', '.join(METHODS)}")
    fields = dataclasses.fields(METHODS[name])
    known = [f.name for f in fields]
    for option in options:
        if option not in known:
            raise ValueError(f"apply: {name} has no option {option!r}; it takes {', '.join(known)}")
    for f in fields:
        if f.name not in options and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"apply: {name} needs the option {f.name}=")
    return METHODS[name](**options)
