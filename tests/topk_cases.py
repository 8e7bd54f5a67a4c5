"""The table of inputs of topk and topk_gather: shapes x dtypes x traps, shared by every backend's tests.

A case is a recipe; `x()` and `score()` make the tensors from a fixed seed, on any device. Scores of the prefix are
always NaN and infinities: nothing may look at them.
"""

import dataclasses
from dataclasses import dataclass

import torch
from cases import DTYPES, lay_out
from torch import Tensor

FUSE = ("none", "sum", "mean")


@dataclass(frozen=True)
class TopkCase:
    B: int = 2
    N: int = 50
    C: int = 24
    k: int = 20
    p: int = 1
    dtype: torch.dtype = torch.float32
    score_dtype: torch.dtype = torch.float32
    trap: str = "random"
    layout: str = "contiguous"
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [f"B{self.B}", f"N{self.N}", f"C{self.C}", f"k{self.k}", f"p{self.p}"]
        parts += [str(t).removeprefix("torch.") for t in dict.fromkeys((self.dtype, self.score_dtype))]
        return "-".join(parts + [t for t in (self.trap, self.layout) if t not in ("random", "contiguous")])

    @property
    def small(self) -> bool:
        """Fit for an interpreter or an emulator."""
        return self.B * self.N <= 128 and self.C <= 128

    def x(self, device: str = "cpu") -> Tensor:
        x = torch.randn(self.B, self.N, self.C, generator=torch.Generator().manual_seed(1000 + self.seed))
        if self.trap == "odd-values":  # every bit counts: signed zeros, NaN with a payload, infinities
            x[:, ::3, ::2] = -0.0
            x[:, 1::7, 1::4] = torch.inf
            x[:, 2::9] = torch.nan
        x = x.to(self.dtype)
        if self.trap == "odd-values":
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
            x.view(bits)[:, 2::9] |= 3
        return self._lay_out(x.to(device))

    def score(self, device: str = "cpu") -> Tensor:
        P = self.N - self.p
        g = torch.Generator().manual_seed(2000 + self.seed)
        s = (3 * torch.randn(self.B, P, generator=g)).softmax(1)  # a row of an attention matrix
        if self.trap == "ties":
            s = torch.randint(0, 4, (self.B, P), generator=g) / 4
        elif self.trap == "equal":
            s[:] = 0.3
        elif self.trap == "zero":
            s[:] = 0
        elif self.trap == "signed-zero":
            s = torch.where(torch.rand(self.B, P, generator=g) < 0.5, 0.0, -0.0)
            s[:, ::8] = 0.5
        elif self.trap == "negative":
            s = -1 - s
        elif self.trap == "mixed":
            s = torch.randn(self.B, P, generator=g)
        elif self.trap == "neighbours":  # a unit in the last place apart, on both sides of zero
            s = torch.stack([1 + torch.rand(P, generator=g).argsort() * 2.0**-23 for _ in range(self.B)])
            s[-1:] *= -1
        elif self.trap == "denormal":
            s = torch.randint(-20, 60, (self.B, P), generator=g) * 2.0**-149
        elif self.trap == "nan":
            s[:, 3::4] = torch.nan
        elif self.trap == "one-nan":
            s[:, P // 2 : P // 2 + 1] = torch.nan
        elif self.trap == "all-nan":
            s[:] = torch.nan
        elif self.trap == "inf":  # of -inf and NaN, which tie, the first are kept
            s[:, ::5] = torch.inf
            s[:, 1::5] = -torch.inf
            s[:, 2::5] = torch.nan
        elif self.trap == "cancel":  # what is not kept has scores that sum to 0 but are not 0
            s[:] = 9
            for row in s:
                others = torch.randperm(P, generator=g)[: max(0, P - self.k)]
                row[others[: len(others) // 2 * 2 : 2]], row[others[1::2]] = 2, -2
                row[others[len(others) // 2 * 2 :]] = 0
        hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).repeat(self.B, self.p // 4 + 1)[:, : self.p]
        return self._lay_out(torch.cat([hostile, s], 1).to(self.score_dtype).to(device))

    def _lay_out(self, t: Tensor) -> Tensor:
        if self.layout == "expanded":
            return t[:1].expand(self.B, *[-1] * (t.dim() - 1))
        return lay_out(t, self.layout)


_T = TopkCase
TRAPS = (
    "ties",
    "equal",
    "zero",
    "signed-zero",
    "negative",
    "mixed",
    "neighbours",
    "denormal",
    "nan",
    "one-nan",
    "all-nan",
    "inf",
    "cancel",
    "odd-values",
)
TOPK_CASES = [
    # Real shapes at a keep rate of 0.7: DeiT-S, distilled, registers, 384 px.
    *[_T(N=197, C=384, k=138, dtype=d) for d in DTYPES],
    _T(B=1, N=198, C=192, k=138, p=2),
    _T(B=1, N=201, C=384, k=138, p=5, dtype=torch.bfloat16),
    _T(B=1, N=577, C=64, k=404, dtype=torch.float16),
    # Every trap, in every dtype.
    *[_T(trap=t, dtype=d) for t in TRAPS for d in DTYPES],
    *[_T(trap=t, p=0, N=41, C=5, k=30, seed=1) for t in TRAPS],
    # k: nothing, one, all but one, all, more than all.
    *[_T(k=k, trap=t) for k in (0, 1, 48, 49, 50, 10**12, 2**63 - 1) for t in ("random", "ties")],
    *[_T(k=48, trap=t) for t in ("one-nan", "zero", "odd-values", "inf")],  # one token alone in the fused row
    # Prefix and length: odd, even, nothing left, almost nothing left.
    *[_T(N=n, p=p, k=7) for n in (30, 31) for p in (0, 1, 2, 5)],
    *[_T(N=p + d, p=p, k=1, C=7) for p in (0, 1, 2, 5) for d in (0, 1, 2, 3)],
    # Beside and at every vector and block of tokens and of channels.
    *[_T(B=1, N=n, p=0, k=n // 2, C=3, trap="ties") for n in (4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65)],
    *[_T(B=1, N=n, p=1, k=n // 3, C=3) for n in (256, 257, 258, 1024, 1025, 1026, 2100)],
    *[_T(C=c, dtype=d) for c in (1, 3, 8, 16, 33, 64, 127) for d in (torch.float32, torch.float16)],
    _T(B=1, N=20, C=1031, k=9, dtype=torch.bfloat16),
    # Scores of another dtype than x; float64 that ties in float32.
    *[_T(score_dtype=d, trap=t) for d in (torch.float16, torch.bfloat16, torch.float64) for t in ("random", "ties")],
    _T(score_dtype=torch.float16, dtype=torch.bfloat16, trap="nan"),
    # Strides.
    *[_T(layout=lay, dtype=d) for lay in ("sliced", "inner", "expanded") for d in (torch.float32, torch.float16)],
    # Empty.
    _T(B=0),
    _T(N=0, p=0),
    _T(C=0),
]


def with_float64(cases: list[TopkCase]) -> list[TopkCase]:
    """The float32 cases again in float64, which the CPU and the reference have for gradcheck."""
    wide = torch.float64
    return cases + [dataclasses.replace(c, dtype=wide) for c in cases if c.dtype == torch.float32]
