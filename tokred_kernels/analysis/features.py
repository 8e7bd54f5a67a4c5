"""Features of two models on the same images: the same up to rotation, or to any linear map?

x [n, C] and y [n, D]: a row for each image, such as the class token after a block. Every measure centres its columns,
and none changes under a rotation, a common order of the images, or a scale of x or of y.
"""

import numpy as np
from scipy import linalg


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Centred kernel alignment |X^T Y|^2 / (|X^T X| |Y^T Y|) with Frobenius norms: in [0, 1], 1 for equal features.

    The published tables have the distance, 1 minus it.
    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.
    """
    x, y = _normalised("linear_cka", x, y)
    alignment = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return float(min(alignment, 1.0))


def procrustes(x: np.ndarray, y: np.ndarray) -> float:
    """|X|^2 + |Y|^2 - 2 |X^T Y|_*, for |X| = |Y| = 1: what is left after the best rotation, in [0, 2], 0: nothing.

    Source: Ding et al., "Grounding Representation Similarity with Statistical Testing", NeurIPS 2021.
    """
    x, y = _normalised("procrustes", x, y)
    return float(max(2 - 2 * np.linalg.norm(x.T @ y, "nuc"), 0.0))


def cca(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Canonical correlations, falling: [k] float64 in [0, 1], k the smaller rank; 1 for equal up to any linear map.

    Its mean is mean CCA, the mean of its squares mean squared CCA. Where n images are no more than both ranks together,
    some correlations are 1 whatever x and y are: that is refused. They are near 1 by chance long before.
    """
    return _canonical("cca", x, y)[0]


def pwcca(x: np.ndarray, y: np.ndarray) -> float:
    """The mean of `cca`, weighted by how much of x each canonical direction h_i of x makes up: in [0, 1].

        sum_i a_i rho_i / sum_i a_i,   a_i = sum_c |<h_i, x_c>|

    Not symmetric: the directions are those of x.
    Source: Morcos et al., "Insights on representational similarity in neural networks with canonical correlation",
    NeurIPS 2018.
    """
    correlation, directions = _canonical("pwcca", x, y)
    weight = np.abs(directions.T @ _centred("pwcca", x)).sum(1)
    return float(weight @ correlation / weight.sum())


def _canonical(name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The correlations [k], and the canonical directions of x [n, k] as columns."""
    x, y = _normalised(name, x, y)
    basis, other = linalg.orth(x), linalg.orth(y)
    ranks = basis.shape[1] + other.shape[1]
    if ranks >= len(x):
        raise ValueError(f"{name}: needs more images than x and y have ranks together, got {len(x)} and {ranks}")
    directions, correlation, _ = linalg.svd(basis.T @ other, full_matrices=False)
    return np.minimum(correlation, 1.0), basis @ directions


def _normalised(name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = _centred(name, x), _centred(name, y)
    if len(x) != len(y):
        raise ValueError(f"{name}: x and y must be of the same images, got {len(x)} and {len(y)}")
    return x / np.linalg.norm(x), y / np.linalg.norm(y)


def _centred(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"{name}: features must be finite [n, C] of at least 2 images, got {list(x.shape)}")
    x = x - x.mean(0)
    if not x.any():
        raise ValueError(f"{name}: the features are the same for every image")
    return x
