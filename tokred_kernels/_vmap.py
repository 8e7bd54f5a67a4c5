"""The vmap rule of every op: all tensors have the batch first, so a mapped dimension is folded into it."""

from torch import Tensor


class BatchFold:
    """Folds the mapped dimension of each tensor argument into its batch dimension, and back out of the results."""

    def __init__(self, info, in_dims: tuple) -> None:
        self.batch_size = info.batch_size
        self.in_dims = in_dims

    def __call__(self, t: Tensor | None, position: int) -> Tensor | None:
        """The argument at `position`, [V * B, ...]; an unmapped one is repeated for each of the V maps."""
        if t is None:
            return None
        dim = self.in_dims[position] if position < len(self.in_dims) else None
        t = t.expand(self.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1)

    def back(self, t: Tensor) -> Tensor:
        """[V * B, ...] to [V, B, ...]."""
        return t.unflatten(0, (self.batch_size, t.shape[0] // self.batch_size))
