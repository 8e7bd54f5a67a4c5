"""match_merge: the kernels of match, then merge_kernel; see match.py and merge.py for formulas and decompositions.

Floor, DeiT-S B=256 N=197 r=13 bfloat16 on an H200: keys and x once, out: 113.6 MB = 26.4 us. In between, only assign,
0.2 MB, goes through memory.
"""

from torch import Tensor

from .. import _check
from ._launch import refuse_float64
from .match import launch_match
from .merge import launch_merge


def match_merge_triton(
    x: Tensor, metric: Tensor, r: int, prefix: int = 1, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check.match_merge(x, metric, r, prefix, size)
    refuse_float64("match_merge", "x", x)
    refuse_float64("match_merge", "metric", metric)
    N = x.shape[1]
    assign = launch_match(metric, r, prefix)
    out, size_out = launch_merge(x, assign, N - int(_check.clamp_r(r, N, prefix)), size, None, "mean")
    return out, size_out, assign
