"""Patterns: what became of each patch of the input, after a block, as one integer.

    0 or more   the row of its token
    -1          dropped
    -2 - row    fused into the token of that row, with all patches that some block did not keep

Every method with assignments has one, so records, metrics and pictures read the same array. A soft method's is its
argmax: the cluster that gives the patch its largest weight.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..trace import Forward


def patterns(forward: Forward, prefix: int, blocks: Sequence[int] | None = None) -> np.ndarray:
    """[B, S, P] int16: the pattern of every image after each of S blocks.

    Ids are composed over the blocks: they are those of the patches that entered the first one, wherever they sit now.

    Args:
        forward: what `tokred_kernels.trace` recorded, such as `traced.last`.
        prefix: the model's `num_prefix_tokens`, which have no pattern.
        blocks: from 0, ascending; None: all of them.
    """
    wanted = range(len(forward.assign)) if blocks is None else blocks
    after = [source.where(~fused, -2 - source) for source, fused in forward.steps()]
    chosen = torch.stack(after, 1)[:, list(wanted), prefix:]
    return chosen.to(torch.int16).cpu().numpy()


def kept(pattern: np.ndarray) -> np.ndarray:
    """[..., P] bool: the patches that are neither dropped nor fused; merged ones count as kept."""
    return np.asarray(pattern) >= 0


def labels(pattern: np.ndarray) -> np.ndarray:
    """[..., P]: the row that each patch went to, fused or not; -1 if dropped."""
    pattern = np.asarray(pattern)
    return np.where(pattern < -1, -2 - pattern, pattern)


def depths(pattern: np.ndarray, blocks: Sequence[int], depth: int) -> np.ndarray:
    """[B, P]: the block in which each patch ceased to be a token of its own, `depth` if it never did.

    It ceases to be one when it is dropped, fused, or merged with another patch. The mean over images is the token depth
    map of methods that drop; for methods that merge, this extends it.

    Args:
        pattern: [B, S, P] after the blocks `blocks` [S], ascending: at least those that reduce.
        depth: the number of blocks of the model.

    Raises:
        ValueError: `blocks` has another length than S, or is not ascending below `depth`.
    """
    pattern, blocks = np.asarray(pattern), np.asarray(blocks, dtype=np.int64)
    if pattern.ndim != 3 or blocks.shape != pattern.shape[1:2]:
        raise ValueError(f"depths: pattern must be [B, {blocks.size}, P], got {list(pattern.shape)}")
    if blocks.size and (np.any(np.diff(blocks) <= 0) or blocks[0] < 0 or blocks[-1] >= depth):
        raise ValueError(f"depths: blocks must be ascending and below {depth}, got {blocks.tolist()}")
    found = np.full((pattern.shape[0], pattern.shape[2]), depth)
    for step in range(blocks.size - 1, -1, -1):  # who is no token of its own stays none: the first block wins
        found[~_alone(pattern[:, step])] = blocks[step]
    return found


def _alone(pattern: np.ndarray) -> np.ndarray:
    """[B, P] bool: the patches that have a row of their own."""
    if pattern.size == 0:
        return np.zeros(pattern.shape, dtype=bool)
    row = labels(pattern).astype(np.int64) + 1
    width = row.max() + 1
    at = row + np.arange(len(pattern))[:, None] * width
    members = np.bincount(at.ravel(), minlength=len(pattern) * width)
    return kept(pattern) & (members[at] == 1)
