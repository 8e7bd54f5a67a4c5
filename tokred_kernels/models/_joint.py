"""Queries, keys, values and ToMe's metric from one product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointProjection(nn.Module):
    """qkv with the head mean of its key rows, and of their bias, as D more rows.

        W = [W_qkv; round(1/H sum_h W_k,h)]   [3 H D + D, C],   b likewise

    summed in head order in float32 (float64 for float64 weights) and rounded to the dtype of the weights.

    W and b are kept between forwards, and made anew where the weights have moved, changed their dtype or been written
    to, but for writes through `.data`, which torch does not count: train() and eval() forget what is kept. Neither is
    in the state dict, a copy or a pickle. Under compilation, and where gradients are taken, they are made each time. A
    captured CUDA graph holds what was kept: capture it again after loading other weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple | None = None

    def forward(self, x: Tensor, qkv: nn.Linear, heads: int) -> Tensor:
        """x [B, N, C] to [B, N, 3 H D + D]."""
        return F.linear(x, *self.weights(qkv, heads))

    def weights(self, qkv: nn.Linear, heads: int) -> tuple[Tensor, Tensor | None]:
        given = [t for t in (qkv.weight, qkv.bias) if t is not None]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or any(t.is_inference() for t in given):
            return tuple(_joined(t, heads) for t in (qkv.weight, qkv.bias))
        if self._kept is None or not all(map(_same, given, *self._kept[:2])):
            joint = tuple(_joined(t, heads) for t in (qkv.weight, qkv.bias))
            if qkv.weight.is_cuda:
                if torch.cuda.is_current_stream_capturing():
                    return joint  # what a graph makes is there when it replays
                torch.cuda.current_stream(qkv.weight.device).synchronize()  # once: other streams will read it too
            # The aliases hold on to the memory: no other weights can be where these were.
            self._kept = [t.detach() for t in given], [t._version for t in given], joint
        return self._kept[2]

    def train(self, mode: bool = True) -> "JointProjection":
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}


def _same(now: Tensor, then: Tensor, version: int) -> bool:
    return now.dtype == then.dtype and now.is_set_to(then) and now._version == version


def _joined(t: Tensor | None, heads: int) -> Tensor | None:
    """Rows [3 H D, ...] of queries, keys and values, and the head mean of the keys' behind them."""
    if t is None:
        return None
    wide = torch.promote_types(t.dtype, torch.float32)
    total = None
    for rows in t.chunk(3)[1].chunk(heads):
        total = rows.to(wide) if total is None else total + rows.to(wide)
    return torch.cat([t, (total / heads).to(t.dtype)])
