"""The methods of `apply`. A new one is one file and one line in METHODS."""

import dataclasses
from typing import ClassVar, Protocol

from torch import Tensor, nn

from .evit import EViT
from .metr import METR
from .tome import ToMe
from .topk import TopK


class Method(Protocol):
    """A frozen dataclass: its fields are the options, checked in __post_init__; it holds nothing of a forward.

    `block` in `step` is the model's block: `tokred_prefix`, the protected tokens in front; `project(x)`, its queries,
    keys and values [B, H, N, D]; `attend(q, k, v, size, scores)`, its attention branch and the scores [B, N];
    `feed_forward(x)`, its MLP branch. Residuals are the method's to add.
    """

    sized: ClassVar[bool]  # its tokens have sizes: attention counts them, averages weigh them

    @property
    def fuses(self) -> bool:
        """Whether a reducing block ends in a fused token: the last row, of all patches it does not keep."""

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless the model has what the options need."""

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        """r of each block, given to `step`: patches to remove, 0 to leave the tokens alone. At least `depth` entries.

        `patches` are those that reach block 0 in this forward, an int or a SymInt.
        """

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        """(tokens in attention, tokens in the MLP) of each block."""

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One block on x [B, N, C]: the new x [B, M, C], its sizes [B, M] and assign [B, N], None if not reduced.

        size is None until tokens have merged. r may be 0. In a forward whose schedule is 0 throughout, blocks run
        their dense forward instead.
        """


METHODS: dict[str, type[Method]] = {"tome": ToMe, "topk": TopK, "evit": EViT, "metr": METR}


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
