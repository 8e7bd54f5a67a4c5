"""What was merged where: `with trace(model) as t: model(images)`, then `t.source`."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

_thread = threading.local()


def compose(source: Tensor | None, assign: Tensor | None) -> Tensor | None:
    """The assignment [B, N0] that applies `source` [B, N0], then `assign` [B, N]; None is the identity."""
    if source is None or assign is None:
        return assign if source is None else source
    return torch.where(source < 0, source, assign.gather(1, source.clamp(min=0).long()))


@dataclass
class Forward:
    """One forward of a patched model.

    Attributes:
        tokens: [N0, N1, ...], the tokens that enter the first block, then those that leave each block.
        assign: for each block, [B, N] int32, the output row of each of its tokens, -1 if dropped; None where the block
            left its tokens alone.
        fused: for each block, the output row of its fused token, into which all patches went that it did not keep;
            None where it fused none.
        counts: [B, 1 + blocks] int64, as `tokens` for each image, without the rows that are only there to make the
            batch rectangular or are masked (size 0): `counts.float().mean(0)` is what a method with a count of its own
            for each image really keeps.
    """

    _identity: Tensor = field(repr=False)
    tokens: list[int]
    assign: list[Tensor | None] = field(default_factory=list)
    fused: list[int | None] = field(default_factory=list)
    _counts: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def counts(self) -> Tensor:
        first = self._identity.new_full(self._identity.shape[:1], self.tokens[0], dtype=torch.int64)
        return torch.stack([first, *self._counts], 1)

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(source, in_fused) as they are after each block."""
        source, inside = self._identity, torch.zeros_like(self._identity, dtype=torch.bool)
        for assign, row in zip(self.assign, self.fused, strict=True):
            source = compose(source, assign)
            if row is not None:
                inside = inside | (source == row)
            yield source, inside

    @property
    def source(self) -> Tensor:
        """[B, N0] int32: the final row of every token that entered the first block, -1 if dropped."""
        return list(self.steps())[-1][0]

    @property
    def in_fused(self) -> Tensor:
        """[B, N0] bool: whether a token was fused in some block. Its `source` is then the row of that fused token,
        wherever later blocks moved it, or of the later fused token that took it in."""
        return list(self.steps())[-1][1]


class trace:
    """Records which token ends in which row, block by block, in every forward of a patched model in this thread.

        with tokred.trace(model) as t:
            model(images)
        t.source                                   # [B, N0] int32

    `source`, `tokens`, `counts`, `assign`, `fused` and `in_fused` are those of the last forward (see `Forward`);
    `history` holds every forward in order, forward_features and forward_intermediates included. What the model computes
    does not change. What gradient checkpointing computes again is not recorded again. Under patch dropout N0 counts the
    tokens that were kept.

    Args:
        model: a model patched by `apply`, run eagerly.

    Raises:
        ValueError: the model is compiled or not patched. RuntimeError: this thread is tracing already, nothing ran yet.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
            raise ValueError("trace: the model is compiled; trace the uncompiled model")
        if not hasattr(model, "tokred_method"):
            raise ValueError(f"trace: {type(model).__name__} has no token reduction; apply one first")
        self.history: list[Forward] = []
        self._model = model
        self._handles: list = []
        self._running: Forward | None = None

    def __enter__(self) -> "trace":
        if getattr(_thread, "tracing", False):
            raise RuntimeError("trace: this thread is tracing already, and a thread can hold one trace")
        _thread.tracing = True
        self._owner = threading.get_ident()
        self._handles = [self._model.patch_embed.register_forward_pre_hook(self._begin)]
        for index, block in enumerate(self._model.blocks):
            self._handles.append(block.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(block.register_forward_hook(partial(self._after, index)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._running = None
        _thread.tracing = False

    @property
    def last(self) -> Forward:
        """The last forward."""
        if not self.history:
            raise RuntimeError("trace: no forward was seen; run the traced, uncompiled model in the thread that traces")
        return self.history[-1]

    @property
    def source(self) -> Tensor:
        return self.last.source

    @property
    def tokens(self) -> list[int]:
        return self.last.tokens

    @property
    def counts(self) -> Tensor:
        return self.last.counts

    @property
    def assign(self) -> list[Tensor | None]:
        return self.last.assign

    @property
    def fused(self) -> list[int | None]:
        return self.last.fused

    @property
    def in_fused(self) -> Tensor:
        return self.last.in_fused

    # Hooks sit on modules, which threads share: each looks only at the thread that traces.

    def _begin(self, _module: nn.Module, _args: tuple) -> None:
        if torch.compiler.is_compiling():
            raise ValueError("trace: the model is being compiled; trace the uncompiled model")
        if threading.get_ident() == self._owner:
            self._running = None

    def _before(self, _block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Asks the block for its assignment too."""
        if threading.get_ident() != self._owner:
            return None
        self._asked = not (args[3] if len(args) > 3 else kwargs.get("with_assign"))
        return (args[:3], {**kwargs, "with_assign": True})

    def _after(self, index: int, _block: nn.Module, args: tuple, output: tuple) -> tuple | None:
        """Records the assignment, and takes it out of the output if nobody else asked for it."""
        if threading.get_ident() != self._owner:
            return None
        x, size, assign = output
        before = args[0]
        if index == 0 and self._running is None:
            identity = torch.arange(before.shape[1], dtype=torch.int32, device=before.device)
            self._running = Forward(identity.expand(before.shape[0], -1), [before.shape[1]])
            self.history.append(self._running)
        # Recomputed under gradient checkpointing, a block comes a second time.
        if self._running is not None and index == len(self._running.assign):
            self._running.assign.append(assign)
            self._running.tokens.append(x.shape[1])
            real = x.new_ones(x.shape[:2]) if size is None else size
            self._running._counts.append((real > 0).sum(1))
            fuses = assign is not None and self._model.tokred_method.fuses
            self._running.fused.append(x.shape[1] - 1 if fuses else None)
        return (x, size) if self._asked else output
