"""What a method is: the base of every class in this folder."""

import operator
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from .. import _check, schedule

# assign [B, N], or what makes it for those who ask: soft methods do not need it themselves, and it is five kernels.
Assign = Tensor | Callable[[], Tensor]


class Method:
    """A frozen dataclass: its fields are the options, checked in __post_init__; it holds nothing of a forward.

    `block` in `step` is the model's block: `tokred_prefix`, the protected tokens in front; `tokred_part`, the method's
    own module in this block, or None; `project(x)`, its queries, keys and values [B, H, N, D], also in two parts, what
    `projections()` gives, and `split_heads(y)` of a product; `attend(q, k, v, size, scores)`, its attention branch and
    the scores [B, N], also in two parts, `heads`, what the heads give [B, H, N, D], and `branch(y)`, that branch of it;
    `feed_forward(x)`, its MLP branch, `feed_normed(norm2(x))` the same. Residuals are the method's to add, but for that
    of the attention in `merge_and_norm` and `select_and_norm`: all that lies between the branches where tokens merge or
    are selected, in as few kernels as there are.
    """

    sized: ClassVar[bool] = False  # its tokens have sizes: attention counts them, averages weigh them
    masks: ClassVar[bool] = False  # some of its tokens have size 0: attention and pooling leave them out
    trains_size: ClassVar[bool] = False  # gradients flow through those sizes from block to block
    fuses = False  # a reducing block ends in a fused token: the last row, of all patches it does not keep

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless the model has what the options need. Called first: it may note the model's shape."""

    def part(self, model: nn.Module, block: int) -> nn.Module | None:
        """Learned weights or constants for `model.blocks[block]`, where `step` finds them as `block.tokred_part`."""
        return None

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        """r of each block, given to `step`: patches to remove, 0 to leave the tokens alone. At least `depth` entries.

        `patches` are those that reach block 0 in this forward, an int or a SymInt.
        """
        raise NotImplementedError

    def counts(self, depth: int, patches: int, prefix: int) -> list[tuple[int, int]]:
        """(tokens in attention, tokens in the MLP) of each block."""
        raise NotImplementedError

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Assign | None]:
        """One block on x [B, N, C]: the new x [B, M, C], its sizes [B, M] and assign [B, N], None if not reduced.

        size is None until tokens have sizes. r may be 0. In a forward whose schedule is 0 throughout, blocks run
        their dense forward instead.
        """
        raise NotImplementedError

    def macs(self, block, n_attention: int, n_mlp: int) -> int:
        """Multiply-accumulates of one block, from its `counts`."""
        return schedule.block_macs(block, n_attention, n_mlp)

    def _name(self) -> str:
        return type(self).__name__.lower()

    def _refuse(self, expected: str, got: object) -> None:
        raise ValueError(f"{self._name()}: {expected}, got {got!r}")

    def _integer(self, option: str, value: object, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self._refuse(f"{option} must be an int of at least {least}", value)

    def _integers(self, option: str, values: object, least: int) -> tuple[int, ...]:
        try:
            found = tuple(operator.index(value) for value in values)
        except TypeError:
            found = None
        if found is None or any(isinstance(value, bool) or value < least for value in values):
            self._refuse(f"{option} must be a list of ints of at least {least}", values)
        return found

    def _check_heads(self, model: nn.Module) -> None:
        for block in model.blocks:
            if block.attn.head_dim > _check.MAX_WIDTH:
                raise ValueError(
                    f"{self._name()}: scores need heads of width {_check.MAX_WIDTH} at most, got {block.attn.head_dim}"
                )
