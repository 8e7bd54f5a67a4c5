"""The methods of `apply`. A new one is one file and one line in METHODS."""

import dataclasses
from typing import Protocol

from torch import Tensor

from .tome import ToMe


class Method(Protocol):
    """A frozen dataclass: its fields are the options, checked in __post_init__; it holds nothing of a forward.

    `block` in `step` is the model's block: `tokred_prefix`, the protected tokens in front; `attend(x, size)`, its
    attention branch and keys [B, H, N, D]; `feed_forward(x)`, its MLP branch. Residuals are the method's to add.
    """

    def schedule(self, depth: int) -> tuple[int, ...]:
        """What each block is asked for, given to `step` as r; 0: leave the tokens alone. At least `depth` entries."""

    def tokens(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        """(tokens in attention, tokens in the MLP) of each block."""

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One block on x [B, N, C]: the new x [B, M, C], its sizes [B, M] and assign [B, N], None if not reduced.

        size is None until tokens have merged; then r may be 0. Called with no size and r = 0, a block runs its dense
        forward instead.
        """


METHODS: dict[str, type[Method]] = {"tome": ToMe}


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
