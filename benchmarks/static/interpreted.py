"""What the Triton kernels read and write, counted in the interpreter: `TRITON_INTERPRET=1 python -m ...`, JSON."""

import importlib
import json
import sys

import numpy as np
import torch

from .triton import all_calls, is_counted

SECTOR = 32


class Counter:
    """Of every launch only the first programs run; the sectors that they touch are counted."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, int]] = []
        self.share = 1.0
        import triton_interpreter  # from tests, which .triton has made importable
        from triton.runtime import interpreter

        triton_interpreter.repair()
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, index, execute = (
            builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx, executor.__call__,
        )  # fmt: skip

        def create_masked_load(this, pointers, mask, *args):
            self._touch(self._read, pointers, mask)
            return load(this, pointers, mask, *args)

        def create_masked_store(this, pointers, value, mask, *args):
            self._touch(self._written, pointers, mask)
            return store(this, pointers, value, mask, *args)

        def set_grid_idx(this, *at):
            self._end_program()
            return index(this, *at)

        def call(this, *args, **kwargs):
            programs = this.grid[0]
            run = min(programs, int(programs * self.share + 0.999))
            this.grid = (run,)
            self._read, self._written, self._reads, self._writes, self._from_l2 = [], [], [], [], 0
            execute(this, *args, **kwargs)
            self._end_program()
            counts = _distinct(self._reads), _distinct(self._writes), self._from_l2
            self.launches.append(tuple(round(n * SECTOR * programs / run) for n in counts))

        builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
        builder.set_grid_idx, executor.__call__ = set_grid_idx, call
        # No address depends on a product.
        builder.create_dot = lambda this, a, b, d, *_: d

    def _touch(self, into: list, pointers, mask) -> None:
        into.append(np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)] // SECTOR))

    def _end_program(self) -> None:
        if self._read:
            sectors = np.unique(np.concatenate(self._read))
            self._from_l2 += len(sectors)
            self._reads.append(sectors)
        self._writes += self._written
        self._read, self._written = [], []


def _distinct(sectors: list) -> int:
    return len(np.unique(np.concatenate(sectors))) if sectors else 0


def main() -> None:
    counter, found = Counter(), {}
    for call in filter(is_counted, all_calls()):
        counter.launches, counter.share = [], 1 / call.parts
        module = importlib.import_module(f"tokred_kernels.triton.{call.op}")
        with torch.no_grad():
            getattr(module, f"{call.op}_triton")(*call.args, **call.kwargs)
        found["/".join(call.id)] = counter.launches
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
