"""Inputs and checks shared by the tests of add_merge_norm and add_topk_gather_norm, on every backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def branch_of(x: Tensor) -> Tensor:
    """[B, N, C] with strides of its own, and values of another size than those of x."""
    g = torch.Generator().manual_seed(7)
    B, N, C = x.shape
    return (3 * torch.randn(B, N, 2, C, generator=g)).to(x.dtype)[:, :, 1]


def affine(C: int, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """(norm_weight, norm_bias)."""
    g = torch.Generator().manual_seed(8)
    return tuple(torch.randn(C, generator=g).to(dtype) for dtype in (dtypes or (torch.float32, torch.float32)))


def scaled(C: int, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """(branch_scale, branch_bias)."""
    g = torch.Generator().manual_seed(9)
    return tuple(torch.randn(C, generator=g).to(dtype) for dtype in (dtypes or (torch.float32, torch.float32)))


def check_rows(out: Tensor, reduce, x: Tensor, branch: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """Asserts that out is reduce(x + scale (branch + bias)), up to the rounding of that sum and of out."""
    wide = branch.double() if bias is None else branch.double() + bias.double()
    y = x.double() + (wide if scale is None else wide * scale.double())
    exact = reduce(y)
    finite = torch.isfinite(exact)
    eps, largest = torch.finfo(out.dtype).eps, torch.nan_to_num(y, 0, 0, 0).abs().amax() if y.numel() else 0
    assert ((out.double() - exact)[finite].abs() <= 2 * eps * (exact[finite].abs() + largest)).all()


def check_norm(normed: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = EPS) -> None:
    """Asserts that normed is the LayerNorm of out, with at most twice the error of torch's own in this dtype."""
    assert normed.dtype == out.dtype and normed.shape == out.shape and normed.is_contiguous()
    shape = out.shape[-1:]
    exact = F.layer_norm(out.double(), shape, *(None if t is None else t.double() for t in (weight, bias)), eps)
    usual = F.layer_norm(out, shape, *(None if t is None else t.to(out.dtype) for t in (weight, bias)), eps)
    finite = torch.isfinite(exact) & torch.isfinite(usual)
    assert (torch.isfinite(normed) | ~finite).all()
    assert normed[exact.isnan()].isnan().all()
    if finite.any():
        error, torch_error = ((t.double() - exact)[finite].abs().amax() for t in (normed, usual))
        units = 16 if out.dtype == torch.float64 else 1  # the oracle itself is float64
        bound = 2 * torch_error + units * torch.finfo(out.dtype).eps * exact[finite].abs().amax()
        # The mean is rounded too: to a unit of itself, which the norm scales as it scales the row.
        row = torch.where(finite, out.double(), 0)
        scale = (row.var(-1, correction=0) + eps).rsqrt() * (1 if weight is None else weight.double().abs().amax())
        unit = torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
        assert error <= bound + 2 * unit * (row.abs().amax(-1) * scale).amax()


def check_steps(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Asserts that two results are the same bits, but for those of a NaN, which depend on who rounds it."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert ((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()).all()
