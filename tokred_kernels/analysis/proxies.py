"""Whether a measure of similarity says who is more accurate, without labels."""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Proxy(NamedTuple):
    """Rank correlations in [-1, 1] with their p-values: see `proxy`."""

    spearman: float
    spearman_p: float
    kendall: float
    kendall_p: float


def proxy(measure: np.ndarray, difference: np.ndarray) -> Proxy:
    """Spearman's rho and Kendall's tau-b between a measure and the difference of accuracy, over pairs of settings.

    Args:
        measure: [n], a metric of each pair (A, B), such as the mean `iou`: usually one A with every B.
        difference: [n], accuracy of A minus accuracy of B, signed: of the same pairs in the same order.

    Returns:
        NaN throughout if either is constant.

    Raises:
        ValueError: fewer than 3 pairs, different lengths, or a value that is not finite.
    """
    measure, difference = np.asarray(measure, dtype=np.float64), np.asarray(difference, dtype=np.float64)
    if measure.ndim != 1 or measure.shape != difference.shape or len(measure) < 3:
        got = f"{list(measure.shape)} and {list(difference.shape)}"
        raise ValueError(f"proxy: measure and difference must be [n] of at least 3 pairs, got {got}")
    if not (np.isfinite(measure).all() and np.isfinite(difference).all()):
        raise ValueError("proxy: measure and difference must be finite")
    if np.ptp(measure) == 0 or np.ptp(difference) == 0:
        return Proxy(*[float("nan")] * 4)
    return Proxy(*map(float, (*stats.spearmanr(measure, difference), *stats.kendalltau(measure, difference))))
