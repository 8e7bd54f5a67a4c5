"""What the kernels of the clustering ops share: how distances are compared, and what their launchers take."""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import inner_contiguous, refuse_float64

NONE = tl.constexpr(2147483647)  # no index


@triton.jit
def ordered(d):
    """Distances as they are compared: NaN counts as +inf."""
    return tl.where(d == d, d, float("inf"))


@triton.jit
def keep_first(value, candidate, j, best, at):
    """The running (smallest value, its lowest index) [BI] of rows, and what a tile of further candidates makes of it.

    value, candidate, j: [BI, BN], the j of later tiles larger; value without NaN. at: NONE before the first candidate.
    """
    value = tl.where(candidate, value, float("inf"))
    smallest = tl.min(value, 1)
    index = tl.min(tl.where(candidate & (value == smallest[:, None]), j, NONE), 1)
    better = (index != NONE) & ((at == NONE) | (smallest < best))
    return tl.where(better, smallest, best), tl.where(better, index, at)


def checked_distance(op: str, distance: Tensor) -> Tensor:
    """float32 with an inner stride of 1; no copy in the steady state, where it is that already."""
    refuse_float64(op, "distance", distance)
    return inner_contiguous(distance.float())


def tile(N: int) -> tuple[int, int]:
    """(rows, columns) of a tile: up to 128 columns at once, in half the registers of 256, the others in rounds."""
    return 8, 64 if N <= 64 else 128


def blocks(distance: Tensor, rows: int) -> tuple[int]:
    """The grid of programs of some rows each."""
    return (distance.shape[0] * triton.cdiv(distance.shape[1], rows),)
