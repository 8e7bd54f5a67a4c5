"""The table of inputs of the clustering ops: shapes x dtypes x traps, shared by every backend's tests.

A case is a recipe; its methods make the tensors from a fixed seed, on any device. `x` is for pairwise_distance; the
other ops get distances that no points need to have: not symmetric, infinite, tied.
"""

import dataclasses
from dataclasses import dataclass

import torch
from cases import DTYPES, INT_MAX, INT_MIN, lay_out
from torch import Tensor

UPDATES = ("textbook", "wttu")


@dataclass(frozen=True)
class ClusterCase:
    B: int = 2
    N: int = 40
    C: int = 24
    K: int = 12
    k: int = 5
    dtype: torch.dtype = torch.float32
    other: torch.dtype = torch.float32  # of density and weight
    trap: str = "random"
    layout: str = "contiguous"
    scale: float = 1.0
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [f"B{self.B}", f"N{self.N}", f"C{self.C}", f"K{self.K}", f"k{self.k}"]
        parts += [str(t).removeprefix("torch.") for t in dict.fromkeys((self.dtype, self.other))]
        return "-".join(parts + [t for t in (self.trap, self.layout) if t not in ("random", "contiguous")])

    @property
    def small(self) -> bool:
        """Fit for an interpreter."""
        return self.B * self.N <= 128 and self.C <= 128

    def x(self, device: str = "cpu") -> Tensor:
        x = torch.randn(self.B, self.N, self.C, generator=self._generator(1))
        if self.trap == "ties":  # corners of a grid: equal distances, equal tokens
            x = x.round().clamp(-1, 1)
        elif self.trap == "equal":
            x[:] = x[:, :1]
        elif self.trap == "zero":
            x[:] = 0
        elif self.trap == "far":  # |x|^2 + |y|^2 - 2xy would leave no digit
            x += 1000
        elif self.trap == "nan":
            x[:, 1::3, ::2] = torch.nan
        elif self.trap == "inf":
            x[:, ::3, 0] = torch.inf
            x[:, 1::3, 0] = -torch.inf
        elif self.trap == "huge":  # squares beyond float32, and below it
            x[:, ::2] *= 1e25
            x[:, 1::2] *= 1e-24
        return self._lay_out(x.to(self.dtype).to(device))

    def distance(self, device: str = "cpu") -> Tensor:
        g = self._generator(2)
        d = torch.rand(self.B, self.N, self.N, generator=g)
        if self.trap == "ties":
            d = (3 * d).round()
        elif self.trap == "equal":
            d[:] = 0.3
        elif self.trap == "zero":
            d = torch.where(d < 0.5, 0.0, -0.0)
        elif self.trap == "far":  # a unit in the last place apart
            d = 1 + (16 * d).round() * 2.0**-23
        elif self.trap in ("nan", "inf"):
            d[torch.rand(d.shape, generator=g) < 0.3] = torch.nan
            d[torch.rand(d.shape, generator=g) < 0.3] = torch.inf
            d[torch.rand(d.shape, generator=g) < 0.02] = -torch.inf
            d[:, 3::5] = torch.nan if self.trap == "nan" else torch.inf
        elif self.trap == "all-nan":
            d[:] = torch.nan
        elif self.trap == "huge":
            d = 3e38 * d
        elif self.trap == "copies":  # every row of costs twice
            d = d[:, : (self.N + 1) // 2].repeat_interleave(2, 1)[:, : self.N]
        return self._lay_out(d.to(self.dtype).to(device))

    def density(self, device: str = "cpu") -> Tensor:
        g = self._generator(3)
        rho = torch.rand(self.B, self.N, generator=g)
        if self.trap in ("ties", "copies"):
            rho = (3 * rho).round()
        elif self.trap == "zero":
            rho = torch.where(rho < 0.5, 0.0, -0.0)
        elif self.trap in ("equal", "all-nan"):
            rho[:] = 0.5 if self.trap == "equal" else torch.nan
        elif self.trap in ("nan", "inf"):
            rho[:, ::3] = -torch.inf
            rho[:, 1::3] = torch.nan
        return self._lay_out(rho.to(self.other).to(device))

    def weight(self, device: str = "cpu") -> Tensor:
        w = torch.randn(self.B, self.N, generator=self._generator(4)).softmax(1)
        if self.trap in ("equal", "copies", "zero"):
            w[:] = 0 if self.trap == "zero" else 1
        elif self.trap == "ties":
            w = (8 * w).round()
        elif self.trap == "nan":
            w[:, ::4] = torch.nan
        elif self.trap == "inf":
            w[:, ::4] = -torch.inf
        return self._lay_out(w.to(self.other).to(device))

    def centres(self, device: str = "cpu") -> Tensor:
        g = self._generator(5)
        c = torch.rand(self.B, max(self.N, self.K), generator=g).argsort(1)[:, : self.K]  # some beyond N where K > N
        if self.trap in ("ties", "nan"):
            c = c % 5  # several times the same
        if self.trap in ("inf", "hostile"):
            stray = torch.tensor([-1, self.N, INT_MIN, INT_MAX])[torch.randint(0, 4, c.shape, generator=g)]
            c = torch.where(torch.rand(c.shape, generator=g) < 0.5, stray, c)
        if self.trap == "all-nan":
            c[-1:] = -1
        return self._lay_out(c.int().to(device))

    def label(self, device: str = "cpu") -> Tensor:
        g = self._generator(6)
        label = torch.randint(0, max(self.K, 1), (self.B, self.N), generator=g)
        if self.trap in ("equal", "copies", "far"):
            label[:] = self.K // 2  # all in one
        if self.trap == "hostile":
            stray = torch.tensor([-1, self.K, INT_MIN, INT_MAX])[torch.randint(0, 4, label.shape, generator=g)]
            label = torch.where(torch.rand(label.shape, generator=g) < 0.5, stray, label)
        if self.trap == "all-nan":
            label[-1:] = -1
        return self._lay_out(label.int().to(device))

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(10 * self.seed + stream)

    def _lay_out(self, t: Tensor) -> Tensor:
        if self.layout == "expanded":
            return t[:1].expand(self.B, *[-1] * (t.dim() - 1))
        if self.layout == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if not t.is_floating_point():
            return t
        return lay_out(t, self.layout)


_C = ClusterCase
TRAPS = ("ties", "equal", "zero", "far", "nan", "inf", "all-nan", "huge", "copies", "hostile")
CLUSTER_CASES = [
    # Real shapes: DeiT-S at a keep rate of 0.7 and its stages, 384 px.
    *[_C(N=196, C=384, K=137, dtype=d, scale=384**-0.5) for d in DTYPES],
    _C(B=1, N=137, C=192, K=96),
    _C(B=1, N=576, C=64, K=403),
    # Every trap, in every dtype.
    *[_C(trap=t, dtype=d) for t in TRAPS for d in DTYPES],
    *[_C(trap=t, B=1, N=83, C=5, K=3, k=20, seed=1) for t in TRAPS],
    # Neighbours and clusters: none, one, all, more than all.
    *[_C(k=k, K=K, trap=t) for k, K in ((0, 0), (1, 1), (39, 39), (40, 40), (10**12, 90)) for t in ("random", "inf")],
    # Beside and at every vector and tile of tokens and of channels.
    *[_C(B=1, N=n, C=3, K=n // 2, trap="ties") for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 65)],
    *[_C(C=c, dtype=d) for c in (1, 2, 8, 17, 63, 64, 65, 127) for d in (torch.float32, torch.bfloat16)],
    # Density and weight of another dtype.
    *[_C(other=d, trap=t) for d in (torch.float16, torch.bfloat16, torch.float64) for t in ("random", "ties")],
    # Strides.
    *[
        _C(layout=lay, dtype=d)
        for lay in ("sliced", "inner", "expanded", "transposed")
        for d in (torch.float32, torch.float16)
    ],
    # Empty.
    _C(B=0),
    _C(N=0),
    _C(N=0, K=0),
    _C(C=0),
]


def with_float64(cases: list[ClusterCase]) -> list[ClusterCase]:
    """Every trap and every length again in float64, which the CPU and the reference have."""
    wide = torch.float64
    again = [c for c in cases if c.B == 1 and c.dtype == torch.float32]
    return cases + [dataclasses.replace(c, dtype=wide, other=wide) for c in again]
