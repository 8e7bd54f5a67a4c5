"""The one table of cases: shapes x dtypes x traps, shared by every backend's tests and by the benchmarks.

    MATCH_CASES    inputs of match and match_merge
    TWO_WAY_CASES  inputs of match(two_way=True)
    MERGE_CASES    inputs of merge and unmerge

A case is a recipe; `inputs()` makes the tensors from a fixed seed, on any device.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("amx", "avx512", "avx2", "portable")  # of the CPU kernels
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values behind other strides: "sliced", a window of a larger tensor; "inner", an inner stride of 2."""
    if layout == "sliced":
        big = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
        window = big[tuple(slice(1, n + 1) for n in t.shape)]
        window.copy_(t)
        return window
    if layout == "inner":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    return t


@dataclass(frozen=True)
class MatchCase:
    """Inputs of match and match_merge. H = 0: metric [B, N, D]; H > 0: keys [B, H, N, D], views of a fused qkv."""

    B: int = 2
    N: int = 50
    C: int = 24
    H: int = 2
    D: int = 16
    r: int = 9
    p: int = 1
    dtype: torch.dtype = torch.float32
    trap: str = "random"
    layout: str = "contiguous"
    weighted: bool = False
    power: float = 1.0
    two_way: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [f"B{self.B}", f"N{self.N}", f"C{self.C}", f"H{self.H}", f"D{self.D}", f"r{self.r}", f"p{self.p}"]
        parts += [_name(self.dtype)] + [t for t in (self.trap, self.layout) if t not in ("random", "contiguous")]
        parts += [f"weight^{self.power:g}"] if self.weighted else []
        return "-".join(parts + (["two-way"] if self.two_way else []))

    @property
    def keywords(self) -> dict:
        return {"power": self.power, "two_way": self.two_way}

    @property
    def small(self) -> bool:
        """Fit for an interpreter or an emulator."""
        return self.B * self.N <= 128 and max(self.H, 1) * self.D <= 128

    def metric(self, device: str = "cpu") -> Tensor:
        g = torch.Generator().manual_seed(1000 + self.seed)
        heads = max(self.H, 1)
        k = torch.randn(self.B, self.N, heads, self.D, generator=g)
        if self.trap == "equal":
            k = torch.ones_like(k)
        elif self.trap == "duplicates":  # every 7 tokens, 4 copies of the first 4
            for n in range(4, self.N):
                if n % 7 < 4:
                    k[:, n] = k[:, n % 4]
        elif self.trap == "zeros":
            k[:, ::3] = 0
        elif self.trap == "all-zero":
            k = torch.zeros_like(k)
        elif self.trap == "signed-zero":  # scores of +0 and -0
            k = torch.zeros_like(k)
            k[..., 0] = torch.where(torch.arange(self.N) % 4 < 2, 1.0, 0.0)[None, :, None]
            k[:, 1::4] *= -1
        elif self.trap == "nan":
            k[:, 8 % max(self.N, 1) :: 11, :, 0] = torch.nan
        elif self.trap == "all-nan":
            k[:] = torch.nan
        elif self.trap == "inf":
            k[:, 5::9, :, self.D // 2] = torch.inf
            k[:, 6::9, :, 0] = -torch.inf
        elif self.trap == "alike":  # keys of a real ViT: a large common part, deciding gaps of 1e-5
            k = 4 * torch.randn(1, 1, heads, self.D, generator=g) + 0.4 * k
        elif self.trap == "huge":  # the float32 sum of squares overflows: cosine 0
            k[:, ::2] *= 3e4 if self.dtype == torch.float16 else 1e30
        elif self.trap == "tiny":  # norms under the floor of 1e-6
            k *= 1e-7
        k = k.to(self.dtype).to(device)
        if self.H == 0:
            return lay_out(k[:, :, 0], self.layout)
        qkv = torch.full((self.B, self.N, 3, heads, self.D), torch.nan, dtype=self.dtype, device=device)
        qkv[:, :, 1] = k
        return lay_out(qkv[:, :, 1].transpose(1, 2), self.layout)

    def weight(self, device: str = "cpu") -> Tensor | None:
        if not self.weighted:
            return None
        w = torch.rand(self.B, self.N, generator=torch.Generator().manual_seed(2000 + self.seed)) + 0.1
        if self.trap == "nan":
            w[:, 4::13] = torch.nan
        return lay_out(w.to(device), self.layout)

    def x(self, device: str = "cpu") -> Tensor:
        x = torch.randn(self.B, self.N, self.C, generator=torch.Generator().manual_seed(3000 + self.seed))
        return lay_out(x.to(self.dtype).to(device), self.layout)

    def size(self, device: str = "cpu") -> Tensor:
        g = torch.Generator().manual_seed(4000 + self.seed)
        size = torch.randint(1, 9, (self.B, self.N), generator=g).float()
        size[:, : self.p] = 1
        return lay_out(size.to(device), self.layout)


_M = MatchCase
_match_traps = [
    "equal",
    "duplicates",
    "zeros",
    "all-zero",
    "signed-zero",
    "nan",
    "all-nan",
    "inf",
    "alike",
    "huge",
    "tiny",
]
MATCH_CASES = [
    # Real shapes: DeiT-T, S, distilled, registers, 384 px.
    *[_M(B=2, N=197, C=384, H=6, D=64, r=13, dtype=d) for d in DTYPES],
    _M(B=1, N=197, C=192, H=3, D=64, r=16, trap="alike"),
    _M(B=1, N=198, C=192, H=3, D=64, r=98, p=2),
    _M(B=1, N=201, C=384, H=6, D=64, r=8, p=5, dtype=torch.bfloat16, trap="alike"),
    _M(B=1, N=257, C=160, H=2, D=80, r=7, trap="alike"),
    _M(B=1, N=577, C=64, H=1, D=64, r=45, trap="alike", dtype=torch.float16),
    # Every trap, in every dtype, small.
    *[_M(trap=t, dtype=d) for t in _match_traps for d in DTYPES],
    *[_M(trap=t, H=0, p=0, N=41, r=20, seed=1) for t in _match_traps],
    # r: nothing, all, more than all, negative.
    *[_M(r=r, H=0) for r in (0, 1, 24, 25, 10_000, -3)],
    # Prefix and length: odd, even, nothing left, almost nothing left.
    *[_M(N=n, p=p, r=5) for n in (30, 31) for p in (0, 1, 2, 5)],
    *[_M(N=p + d, p=p, r=2) for p in (0, 1, 2, 5) for d in (0, 1, 2, 3)],
    # Width: below, at and beside every vector and tile; one channel; heads.
    *[_M(D=d, H=h, r=6, C=d) for d in (1, 3, 8, 17, 33, 100, 128) for h in (0, 3)],
    # Empty.
    _M(B=0),
    _M(C=0),
    _M(D=0, H=1),
    # Strides.
    *[
        _M(layout=lay, H=h, dtype=d)
        for lay in ("sliced", "inner")
        for h in (0, 2)
        for d in (torch.float32, torch.float16)
    ],
    # Weights.
    *[_M(weighted=True, power=q, H=h) for q in (1.0, 2.0, 0.5) for h in (0, 2)],
    *[_M(weighted=True, trap=t, dtype=d) for t in ("equal", "duplicates", "nan") for d in DTYPES],
    _M(weighted=True, layout="inner", p=2, N=51),
    # One row of a tile more than a vector of double: found a read past the last rank.
    _M(B=1, N=9, C=5, H=1, D=3, r=4, p=0),
]
# Everything that one way can meet; and what only the second way has: no a that leaves (r = 1), chains.
TWO_WAY_CASES = [
    *(replace(c, two_way=True) for c in MATCH_CASES),
    *[_M(N=n, r=r, p=1, H=0, two_way=True, dtype=d) for n in (30, 31) for r in (2, 3, 14, 15) for d in DTYPES],
    _M(N=90, r=44, p=1, weighted=True, power=2.0, two_way=True),
]


@dataclass(frozen=True)
class MergeCase:
    """Inputs of merge and unmerge: assign is made by `kind`."""

    B: int = 2
    N: int = 23
    M: int = 11
    C: int = 24
    dtype: torch.dtype = torch.float32
    kind: str = "random"
    size: str = "none"
    weight: str = "none"
    trap: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [f"B{self.B}", f"N{self.N}", f"M{self.M}", f"C{self.C}", _name(self.dtype), self.kind]
        parts += [f"size-{self.size}"] if self.size != "none" else []
        parts += [f"weight-{self.weight}"] if self.weight != "none" else []
        return "-".join(parts + [t for t in (self.trap, self.layout) if t not in ("normal", "contiguous")])

    @property
    def small(self) -> bool:
        return self.B * self.N <= 128 and self.C <= 128

    def _generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(salt + self.seed)

    def assign(self, device: str = "cpu") -> Tensor:
        """int32 [B, N]."""
        B, N, M = self.B, self.N, self.M
        a = torch.randint(0, max(M, 1), (B, N), generator=self._generator(5000))
        if self.kind == "onto":  # every row has a member
            a[:, : min(M, N)] = torch.arange(min(M, N))
            a = a[:, torch.randperm(N, generator=self._generator(5001))]
        elif self.kind == "one":  # everything in the last row
            a[:] = M - 1
        elif self.kind == "identity":
            a[:] = torch.arange(N)
        elif self.kind == "dropped":
            a[torch.rand(B, N, generator=self._generator(5002)) < 0.4] = -1
        elif self.kind == "all-dropped":
            a[:] = -1
        elif self.kind == "hostile":
            bad = torch.tensor([M, M + 1, -2, INT_MIN, INT_MAX, INT_MAX - 7, -1])
            at = torch.rand(B, N, generator=self._generator(5003)) < 0.5
            a = torch.where(at, bad[torch.randint(0, len(bad), (B, N), generator=self._generator(5004))], a)
        return lay_out_int(a.int().to(device), self.layout)

    def x(self, device: str = "cpu") -> Tensor:
        x = torch.randn(self.B, self.N, self.C, generator=self._generator(6000))
        if self.trap == "constant":
            x = torch.full_like(x, 0.7)
        elif self.trap == "nan":
            x[:, ::5, ::3] = torch.nan
        elif self.trap == "inf":
            x[:, ::4, 1::3] = torch.inf
            x[:, 1::4, ::3] = -torch.inf
        elif self.trap == "signed-zero":
            x = torch.where(x > 0, 0.0, -0.0)
        elif self.trap == "large":
            x *= 1e4
        x = x.to(self.dtype).to(device)
        if self.layout == "expanded":
            return x[:1].expand(self.B, -1, -1) if self.B else x
        return lay_out(x, self.layout)

    def y(self, device: str = "cpu") -> Tensor:
        """[B, M, C] for unmerge."""
        y = torch.randn(self.B, self.M, self.C, generator=self._generator(7000)).to(self.dtype).to(device)
        return lay_out(y, self.layout)

    def per_token(self, what: str, device: str = "cpu") -> Tensor | None:
        kind = getattr(self, what)
        if kind == "none":
            return None
        g = self._generator(8000 if what == "size" else 9000)
        w = torch.randint(1, 9, (self.B, self.N), generator=g).float()
        if kind == "zero":
            w[:] = 0
        elif kind == "cancel":  # sums to 0 exactly, but is not 0
            w = torch.where(torch.arange(self.N) % 2 == 0, 2.0, -2.0).expand(self.B, -1).clone()
        elif kind == "large":  # overflows a float16 product
            w *= 5000
        elif kind == "nan":
            w[:, ::6] = torch.nan
        elif kind in ("float16", "float64"):
            w = w.to(getattr(torch, kind))
        elif kind == "fraction":
            w = torch.rand(self.B, self.N, generator=g)
        return lay_out(w.to(device), self.layout)


def lay_out_int(t: Tensor, layout: str) -> Tensor:
    return torch.stack([t, torch.full_like(t, INT_MAX)], -1)[..., 0] if layout in ("sliced", "inner") else t


_G = MergeCase
MERGE_CASES = [
    *[_G(N=197, M=184, C=384, kind="onto", size="count", dtype=d) for d in DTYPES],
    *[_G(kind=k, dtype=d) for k in ("random", "onto", "one", "dropped", "hostile") for d in DTYPES],
    *[
        _G(kind="one", N=70, M=1, C=c, size="count", dtype=d)
        for c in (8, 129, 1031)
        for d in (torch.float32, torch.bfloat16)
    ],
    _G(kind="one", N=1500, M=2, B=1, C=40, size="count", dtype=torch.float16),
    _G(kind="identity", N=11, size="count", dtype=torch.bfloat16),
    _G(kind="all-dropped"),
    *[
        _G(size=s, kind="onto", dtype=d)
        for s in ("zero", "cancel", "large", "nan", "float16", "float64")
        for d in DTYPES
    ],
    *[_G(weight=w, size="count", dtype=d) for w in ("fraction", "zero", "cancel", "large", "nan") for d in DTYPES],
    *[
        _G(trap=t, kind="onto", size="count", dtype=d)
        for t in ("constant", "nan", "inf", "signed-zero", "large")
        for d in DTYPES
    ],
    *[_G(C=c, size="count", dtype=d) for c in (1, 3, 16, 33, 64, 127) for d in (torch.float32, torch.float16)],
    *[_G(layout=lay, size="count", dtype=d) for lay in ("sliced", "inner", "expanded") for d in DTYPES],
    _G(B=0),
    _G(N=0),
    _G(M=0, kind="hostile"),
    _G(C=0, size="count"),
    _G(N=1, M=1),
    _G(N=5, M=400, kind="onto"),
    _G(N=600, M=300, C=8, B=1, size="count"),
]


def by_id(cases):
    """A test of every case, named by it."""
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id)
