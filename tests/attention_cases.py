"""The one table of cases of attention, attention_scores and attention_backward, as cases.py is for the other ops.

A case is a recipe; `qkv()`, `size()` and `grads()` make the tensors from a fixed seed, on any device.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from cases import DTYPES, _name, lay_out
from torch import Tensor

MASKING = ("zeros", "negative", "nan", "masked", "one-left", "image-masked", "first-masked", "late", "early")
DIFFERENTIABLE = ("normal", "equal", "duplicates", "rising", "falling", "garbage")  # traps: every gradient is finite
SIZES = ("ones", "counts", "fraction", "large", "float16", "float64", *MASKING)


@dataclass(frozen=True)
class AttentionCase:
    """Nq = None: q, k, v are views of one fused qkv projection; else q of its own and views of a fused kv."""

    B: int = 2
    H: int = 2
    N: int = 50
    Nq: int | None = None
    D: int = 16
    dtype: torch.dtype = torch.float32
    size_kind: str = "none"
    scores: str = "cls"
    scale: float | None = None
    layout: str = "fused"
    trap: str = "normal"
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [f"B{self.B}", f"H{self.H}", f"N{self.N}"] + ([f"Nq{self.Nq}"] if self.Nq is not None else [])
        parts += [f"D{self.D}", _name(self.dtype), self.scores]
        parts += [f"size-{self.size_kind}"] if self.size_kind != "none" else []
        parts += [f"scale{self.scale:g}"] if self.scale is not None else []
        return "-".join(parts + [t for t in (self.trap, self.layout) if t not in ("normal", "fused")])

    @property
    def queries(self) -> int:
        return self.N if self.Nq is None else self.Nq

    @property
    def small(self) -> bool:
        """Fit for an interpreter or an emulator."""
        return self.B * self.H * self.queries * self.N * self.D <= 600_000

    @property
    def keywords(self) -> dict:
        return {"scale": self.scale, "scores": self.scores}

    def _generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(salt + self.seed)

    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, Nq, H, D], k and v [B, N, H, D] in float64, with the trap set."""
        g = self._generator(10_000)
        B, H, N, Nq, D = self.B, self.H, self.N, self.queries, self.D
        q, k, v = (torch.randn(B, n, H, D, generator=g, dtype=torch.float64) for n in (Nq, N, N))
        if self.trap == "equal":  # every logit of a row the same
            k = torch.ones_like(k)
        elif self.trap == "duplicates":
            k, v = (t[:, torch.arange(N) % 4] for t in (k, v))
        elif self.trap in ("rising", "falling"):  # the running maximum moves in every tile, or never again
            q[..., 0] = D**0.5
            k[..., 0] = torch.linspace(0, 40, N, dtype=torch.float64)[None, :, None]
            k = k.flip(1) if self.trap == "falling" else k
        elif self.trap == "large-v":
            v *= 1e4 if self.dtype == torch.float16 else 1e18
        elif self.trap == "nan-q":  # the class token's row too
            q[:, ::7] = torch.nan
        elif self.trap == "nan-k":  # every row of the first image
            k[:1, 3::11, :, 1] = torch.nan
        elif self.trap == "nan-v":  # one column
            v[:, 4::11, :, 0] = torch.nan
        elif self.trap == "inf-q":
            q[:, 1::5, :, D // 2] = torch.inf
        elif self.trap == "inf-k":
            k[:, 5::9, :, D // 2] = torch.inf
        elif self.trap == "inf-v":
            v[:, 5::9, :, 1:3] = torch.inf
            v[:, 6::9, :, 2:4] = -torch.inf
        elif self.trap == "no-mass":  # rows of which every logit is -inf
            q[:, ::3, :, 0] = -torch.inf
            k[..., 0] = k[..., 0].abs() + 0.1
        elif self.trap == "late-mass":  # the first half of every row's logits is -inf
            q[..., 0] = q[..., 0].abs() + 0.1
            k[:, : N // 2, :, 0] = -torch.inf
        elif self.trap == "garbage":  # in the rows of masked keys
            masked = ~(self._size() > 0)
            for t, fill in ((k, (torch.nan, torch.inf)), (v, (-torch.inf, torch.nan))):
                t[:, ::2][masked[:, ::2]] = fill[0]
                t[:, 1::2][masked[:, 1::2]] = fill[1]
        return q, k, v

    def qkv(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, Nq, D], k and v [B, H, N, D]."""
        q, k, v = (t.to(self.dtype).to(device) for t in self._values())
        if self.layout != "fused":
            return tuple(self._lay_out(t.transpose(1, 2).contiguous()) for t in (q, k, v))
        if self.Nq is not None:
            k, v = torch.stack([k, v], 2).unbind(2)
            return tuple(t.transpose(1, 2) for t in (q, k, v))
        return torch.stack([q, k, v], 2).permute(2, 0, 3, 1, 4).unbind(0)

    def _lay_out(self, t: Tensor) -> Tensor:
        if self.layout == "expanded" and t.shape[0]:  # one image for the whole batch
            return t[:1].expand(self.B, *t.shape[1:])
        if self.layout == "one-head":  # one head for all
            return t[:, :1].expand(-1, self.H, *t.shape[2:])
        return lay_out(t, self.layout)

    def _size(self) -> Tensor | None:
        """float64 [B, N]."""
        g = self._generator(11_000)
        size = torch.randint(1, 9, (self.B, self.N), generator=g).double()
        unlike = torch.rand(self.B, self.N, generator=g)  # which keys the kind strikes
        kind = self.size_kind
        if kind == "none":
            return None
        if kind == "ones":
            size[:] = 1
        elif kind == "fraction":
            size = unlike.double() + 1e-3
        elif kind == "large":
            size[unlike < 0.3] = 1e6
        elif kind in ("zeros", "negative", "nan"):
            size[unlike < 0.4] = {"zeros": 0.0, "negative": -3.0, "nan": torch.nan}[kind]
        elif kind == "masked":
            size[:] = 0
        elif kind == "image-masked":
            size[:1] = 0
        elif kind == "one-left":
            size[torch.arange(self.N) != self.N // 2 + torch.arange(self.B)[:, None]] = 0
        elif kind == "first-masked":
            size[:, :1] = 0
        elif kind == "late":  # whole tiles masked before the first key that counts
            size[:, : self.N - 3] = 0
        elif kind == "early":  # and after the last
            size[:, 3:] = 0
        return size[:1].expand(self.B, -1) if self.layout == "expanded" and self.B else size

    def size(self, device: str = "cpu") -> Tensor | None:
        """[B, N] in float32, but for the kinds that name a dtype."""
        size = self._size()
        if size is None:
            return None
        dtype = getattr(torch, self.size_kind) if self.size_kind.startswith("float") else torch.float32
        size = size.to(dtype).to(device)
        if self.layout == "expanded":
            return size[:1].expand(self.B, -1) if self.B else size
        return lay_out(size, self.layout)

    def grads(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """grad_out [B, H, Nq, D] as the transpose that a projection leaves, grad_scores [B, N] ([B, 0] for none)."""
        g = self._generator(12_000)
        out = torch.randn(self.B, self.queries, self.H, self.D, generator=g, dtype=torch.float64)
        emitted = 0 if self.scores == "none" else self.N
        scores = torch.randn(self.B, emitted, generator=g, dtype=torch.float64) * self.N  # of the order of grad_out's
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return out.to(self.dtype).to(device).transpose(1, 2), scores.to(wide).to(device)


_A = AttentionCase
_scores = itertools.cycle(("cls", "mean", "none", "cls", "mean"))
_sizes = itertools.cycle(("none", "counts", "zeros", "counts", "none", "large", "zeros"))


def _varied(**fields) -> AttentionCase:
    """Scores and sizes in turn, where the case is about something else: 5 and 7, to fall in step with no loop below."""
    return _A(scores=next(_scores), size_kind=next(_sizes), **fields)


# One short of, at and one past every tile and vector that a kernel may have.
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129)
WIDTHS = (8, 16, 24, 32, 40, 64, 72, 80, 88, 96, 104, 120, 128)
_HALF = (torch.float16, torch.bfloat16)

ATTENTION_CASES = [
    # Real shapes: DeiT-T, S, B, distilled, registers, patches of 14, 384 px.
    *[_A(N=197, H=3, D=64, size_kind="counts", scores=s, dtype=d) for s in ("cls", "mean") for d in DTYPES],
    _A(B=1, N=197, H=12, D=64, scores="none"),
    _A(B=1, N=198, H=3, D=64, scores="mean", dtype=torch.bfloat16),
    _A(B=1, N=201, H=6, D=64, size_kind="counts"),
    _A(B=1, N=257, H=2, D=80, scores="mean"),
    _A(B=1, N=577, H=1, D=64, size_kind="counts", scores="mean", dtype=torch.float16),
    _A(B=1, N=577, H=2, D=64, size_kind="zeros"),
    # Lengths and widths around every tile.
    *[_varied(B=1, H=1, N=n, D=32, dtype=d) for n in LENGTHS for d in DTYPES],
    *[_varied(B=1, H=1, N=n, D=64) for n in (196, 255, 256, 300, 1025)],
    *[_varied(B=1, N=33, D=n, dtype=d, seed=1) for n in WIDTHS for d in DTYPES],
    # More and fewer queries than keys; keys without end for one query.
    *[
        _varied(Nq=m, N=n, D=24, dtype=d)
        for m, n in ((1, 1), (1, 7), (1, 64), (1, 300), (5, 33), (65, 17), (64, 65), (130, 2), (33, 197))
        for d in (torch.float32, torch.bfloat16)
    ],
    # Sizes, over more than one tile of 64 keys.
    *[_A(N=70, H=3, size_kind=s, scores="mean", dtype=d, seed=2) for s in SIZES for d in DTYPES],
    *[_A(N=150, B=1, H=1, size_kind=s, seed=3) for s in MASKING],
    *[_A(N=70, size_kind=s, trap="garbage", scores="mean", dtype=d) for s in MASKING for d in DTYPES],
    *[_A(N=9, size_kind=s, trap="garbage", seed=4) for s in MASKING],
    # Values.
    *[
        _A(N=70, trap=t, scores=s, dtype=d)
        for t in ("equal", "duplicates", "rising", "falling", "large-v", "nan-q", "nan-k", "nan-v", "inf-q", "inf-k")
        for s, d in zip(("cls", "mean", "cls"), DTYPES, strict=True)
    ],
    *[_A(N=70, trap=t, scores="mean", dtype=d) for t in ("inf-v", "no-mass", "late-mass") for d in DTYPES],
    *[_A(N=70, trap=t, size_kind="zeros", scores="mean") for t in ("nan-q", "nan-k", "inf-k", "no-mass", "late-mass")],
    _A(N=150, B=1, H=1, trap="rising", size_kind="large", dtype=torch.float16),
    _A(N=150, B=1, H=1, trap="falling", size_kind="counts", scores="mean"),
    # Logits of +-1e4, equal logits, the order of them turned round.
    *[_A(scale=600.0, size_kind=s, scores="mean", dtype=d) for s in ("none", "large") for d in DTYPES],
    *[_A(scale=f, size_kind="counts", scores=s) for f in (0.0, -0.25, 1.0) for s in ("cls", "mean")],
    # Strides.
    *[
        _varied(layout=lay, D=24, dtype=d)
        for lay in ("contiguous", "sliced", "inner", "expanded", "one-head")
        for d in DTYPES
    ],
    *[_A(layout=lay, Nq=20, size_kind="zeros", scores="mean") for lay in ("sliced", "inner", "expanded")],
    # Empty.
    *[_A(size_kind="counts", scores=s, **none) for none in ({"B": 0}, {"N": 0}, {"D": 0}) for s in ("cls", "mean")],
    *[_A(Nq=m, N=n, scores=s) for m, n in ((0, 9), (9, 0), (0, 0)) for s in ("cls", "mean", "none")],
    _A(B=0, N=0, scores="none", dtype=torch.bfloat16),
]


def in_float64(cases: list[AttentionCase]) -> list[AttentionCase]:
    """The small float32 cases in float64, which the CPU and the reference have for gradcheck."""
    return [replace(c, dtype=torch.float64) for c in cases if c.dtype == torch.float32 and c.small]
