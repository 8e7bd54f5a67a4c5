"""Triton's interpreter (TRITON_INTERPRET=1), repaired, in a process of its own: kernels run on CPU tensors.

Triton reads TRITON_INTERPRET when it is imported, so interpreted and compiled kernels cannot share a process.
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
from collections.abc import Iterator
from unittest import mock

import torch

_launched: dict[str, dict[str, torch.Tensor]] = {}  # the tensors of each kernel, kernels in order


def repair() -> None:
    """Faults of triton 3.6 to 3.9 with numpy 2.4 and 2.5; a repair is harmless where a version does not need it.

    - an index is one element of whatever shape: `range(0, n)` with n of shape [1] raises in numpy >= 2.4;
    - the cast from float32 to bfloat16 rounds to nearest even, as the hardware does; the interpreter truncates;
    - tl.dot of bfloat16 multiplies values, not their bit patterns;
    - tl.dot runs in float64: numpy's float32 matmul rounds equal rows differently at its tile edges;
    - tl.sum runs in float64: numpy adds the rows of a matrix one after another, no tree as hardware does;
    - a scalar keeps its numpy dtype when it becomes a block: a comparison became integers, and triton 3.9 refuses
      those as a mask;
    - tl.maximum and tl.minimum drop a NaN, unless told to propagate it;
    - a device function patches triton.language at its first call in a launch; the interpreter does at every call, which
      takes most of its time.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor, *scope):
        result = patch_tensor(tensor, *scope)

        def index(self) -> int:
            return int(np.asarray(self.handle.data).reshape(()))

        if scope:  # restores what it has set
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_rounding(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return interpreter.TensorHandle(np.where(nan, 0x7FFF, rounded).astype(np.uint16), dst_type.scalar)

    def wide(handle):
        data = handle.data
        if handle.dtype.scalar == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float64)

    def dot(self, a, b, d, *_):
        with np.errstate(invalid="ignore"):
            product = np.matmul(wide(a), wide(b)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    def total(self, block):
        data = block.handle.data
        wide = np.float64 if data.dtype == np.float32 else None
        result = np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=wide)
        return self.to_tensor(result if wide is None else result.astype(np.float32), block.dtype)

    def splat(self, block_type, scalar):
        value = np.asarray(scalar.data).reshape(-1)[0]
        return interpreter.TensorHandle(np.full(block_type.shape, value), scalar.dtype.scalar)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    for name in dir(builder):
        if getattr(builder, name) is cast:
            setattr(builder, name, cast_rounding)
    builder.create_dot = dot
    interpreter.ReduceOps.sum = total
    builder.create_splat = splat
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)

    patched = set()
    execute = interpreter.GridExecutor.__call__

    def execute_and_record(self, *args, **kwargs):
        patched.clear()
        execute(self, *args, **kwargs)
        tensors = {name: t for name, t in zip(self.arg_names, args, strict=False) if isinstance(t, torch.Tensor)}
        _launched[self.fn.__name__] = tensors

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = execute_and_record
    interpreter.InterpretedFunction.__call__ = call


_entered = contextlib.ExitStack()  # until the process ends


def _start() -> None:
    """In the interpreting process: repaired, poisoned, with every op on Triton."""
    repair()
    import tokred_kernels as tokred

    torch.set_num_threads(1)
    # Uninitialised memory is NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _entered.enter_context(tokred.use_backend("triton"))


def _call(op: str, arguments: bytes) -> bytes:
    args, kwargs = torch.load(io.BytesIO(arguments))
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in inputs]
    _launched.clear()
    result = getattr(torch.ops.tokred, op)(*args, **kwargs)
    for t, old in zip(inputs, before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True, msg=f"{op} changed an input")
    return _pack((result, _launched))


def _pack(value) -> bytes:
    """torch.save keeps the strides, and what lies between the elements."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Interpreter:
    """Calls ops by name in the interpreting process, which checks that inputs are unchanged."""

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        self._pool = pool
        self.launched: dict[str, dict[str, torch.Tensor]] = {}  # the kernels of the last call, with their tensors

    def __call__(self, op: str, *args, **kwargs):
        packed = self._pool.submit(_call, op, _pack((args, kwargs))).result()
        result, self.launched = torch.load(io.BytesIO(packed))
        return result


@contextlib.contextmanager
def interpreter() -> Iterator[Interpreter]:
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_start)
        pool.submit(int).result()  # starts the process
    with pool:
        yield Interpreter(pool)
