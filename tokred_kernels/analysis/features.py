"""Features of two models on the same images: the same up to rotation, or to any linear map?

x [n, C] and y [n, D]: a row for each image, such as the class token after a block. Every measure centres the columns
and divides by the norm, and none changes under a rotation, a common order of the images, or a scale of x or of y.
"""

import functools
from collections.abc import Iterator

import numpy as np
from scipy import linalg

# Images at a time: x may be a record on disk.
_IMAGES = 4096


class Centred:
    """Features with what a comparison needs of them: make it once where there is more than one.

    Of x, centred and divided by its Frobenius norm, x = U S V^T: `spectrum` [r] is S, `axes` [r, C] is V^T, r the rank.

    Raises:
        ValueError: fewer than two images, a value that is not finite, or the same features for every image.
    """

    def __init__(self, x: np.ndarray) -> None:
        self._x = x = np.asanyarray(x)
        if x.ndim != 2 or len(x) < 2 or not all(np.isfinite(part).all() for part in self._raw()):
            raise ValueError(f"features must be finite [n, C] of at least 2 images, got {list(x.shape)}")
        self._mean = sum(part.sum(0, dtype=np.float64) for part in self._raw()) / len(x)
        self._norm = 1.0
        triangle = np.zeros((0, x.shape[1]))
        for part in self.parts():
            triangle = np.linalg.qr(np.concatenate([triangle, part]), mode="r")
        _, spectrum, axes = linalg.svd(triangle, full_matrices=False)
        largest = max(spectrum[0], np.abs(self._mean).max() * len(x) ** 0.5)  # what rounding is relative to
        rank = int((spectrum > largest * max(x.shape) * np.finfo(float).eps).sum())
        if rank == 0:
            raise ValueError("the features are the same for every image")
        self._norm = float(np.linalg.norm(spectrum))
        self.spectrum, self.axes = spectrum[:rank] / self._norm, axes[:rank]

    def __len__(self) -> int:
        return len(self._x)

    def parts(self) -> Iterator[np.ndarray]:
        """The centred features, float64, some images at a time."""
        for part in self._raw():
            yield (part - self._mean) / self._norm

    def _raw(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._x), _IMAGES):
            yield self._x[start : start + _IMAGES]


def linear_cka(x: np.ndarray | Centred, y: np.ndarray | Centred) -> float:
    """Centred kernel alignment |X^T Y|^2 / (|X^T X| |Y^T Y|) with Frobenius norms: in [0, 1], 1 for equal features.

    The published tables have the distance, 1 minus it.
    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.
    """
    x, y = _pair("linear_cka", x, y)
    both = np.linalg.norm(x.spectrum**2) * np.linalg.norm(y.spectrum**2)
    return float(min(np.linalg.norm(_cross(x, y)) ** 2 / both, 1.0))


def procrustes(x: np.ndarray | Centred, y: np.ndarray | Centred) -> float:
    """|X|^2 + |Y|^2 - 2 |X^T Y|_*, for |X| = |Y| = 1: what is left after the best rotation, in [0, 2], 0: nothing.

    Source: Ding et al., "Grounding Representation Similarity with Statistical Testing", NeurIPS 2021.
    """
    x, y = _pair("procrustes", x, y)
    return float(max(2 - 2 * np.linalg.norm(_cross(x, y), "nuc"), 0.0))


def cca(x: np.ndarray | Centred, y: np.ndarray | Centred) -> np.ndarray:
    """Canonical correlations, falling: [k] float64 in [0, 1], k the smaller rank; 1 for equal up to any linear map.

    Its mean is mean CCA, the mean of its squares mean squared CCA. Where n images are no more than both ranks together,
    some correlations are 1 whatever x and y are: that is refused. They are near 1 by chance long before.
    """
    x, y = _pair("cca", x, y)
    return _canonical("cca", x, y)[0]


def pwcca(x: np.ndarray | Centred, y: np.ndarray | Centred) -> float:
    """The mean of `cca`, weighted by how much of x each canonical direction h_i of x makes up: in [0, 1].

        sum_i a_i rho_i / sum_i a_i,   a_i = sum_c |<h_i, x_c>|

    Not symmetric: the directions are those of x.
    Source: Morcos et al., "Insights on representational similarity in neural networks with canonical correlation",
    NeurIPS 2018.
    """
    x, y = _pair("pwcca", x, y)
    correlation, directions = _canonical("pwcca", x, y)
    weight = np.abs(directions.T @ (x.spectrum[:, None] * x.axes)).sum(1)
    return float(weight @ correlation / weight.sum())


def _canonical(name: str, x: Centred, y: Centred) -> tuple[np.ndarray, np.ndarray]:
    """The correlations [k], and the canonical directions of x in the basis U, [r, k]."""
    ranks = len(x.spectrum) + len(y.spectrum)
    if ranks >= len(x):
        raise ValueError(f"{name}: needs more images than x and y have ranks together, got {len(x)} and {ranks}")
    return _directions(x, y)


# A pair is compared by several measures, one after the other.
@functools.lru_cache(maxsize=1)
def _directions(x: Centred, y: Centred) -> tuple[np.ndarray, np.ndarray]:
    between = (x.axes @ _cross(x, y) @ y.axes.T) / x.spectrum[:, None] / y.spectrum  # U_x^T U_y
    directions, correlation, _ = linalg.svd(between, full_matrices=False)
    return np.minimum(correlation, 1.0), directions


@functools.lru_cache(maxsize=1)
def _cross(x: Centred, y: Centred) -> np.ndarray:
    """X^T Y, [C, D]."""
    return sum(a.T @ b for a, b in zip(x.parts(), y.parts(), strict=True))


def _pair(name: str, x: np.ndarray | Centred, y: np.ndarray | Centred) -> tuple[Centred, Centred]:
    try:
        x, y = (one if isinstance(one, Centred) else Centred(one) for one in (x, y))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if len(x) != len(y):
        raise ValueError(f"{name}: x and y must be of the same images, got {len(x)} and {len(y)}")
    return x, y
