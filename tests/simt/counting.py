"""What the CUDA launchers launch and what that reads and writes: counted on the emulator."""

import ctypes
from dataclasses import dataclass
from unittest import mock

from . import ops
from .build import emulator

_SECTOR = 32


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel (mangled name). Bytes are those of whole sectors, each counted once."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    dependent: bool
    read: int
    written: int
    from_l2: int  # read, counted once a block


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        *(
            (n, ctypes.c_int64)
            for n in ("blocks", "threads", "shared", "dependent", "run", "read", "written", "from_l2")
        ),
    ]

    def whole(self) -> Launch:
        def of_all(sectors: int) -> int:
            return round(sectors * _SECTOR * self.blocks / max(1, self.run))

        counts = of_all(self.read), of_all(self.written), of_all(self.from_l2)
        return Launch(self.kernel.decode(), self.blocks, self.threads, self.shared, bool(self.dependent), *counts)


def launches(op: str, *args, share: float = 1.0, **kwargs) -> list[Launch]:
    """The launches of `ops.<op>(*args, **kwargs)`, in order.

    share: of each launch that many of its blocks run, the first ones, and the counts are scaled. Blocks are in order of
    images, those of attention in order of heads: with a share of one image or head the counts are exact. 0: none runs.
    """
    module = emulator("simt_counting")
    library = ctypes.CDLL(module.__file__)
    library.counting_launches.restype = ctypes.c_int64
    library.counting_start(ctypes.c_double(share))
    watched = set()

    def address(t) -> int:
        if t is None:
            return 0
        storage = t.untyped_storage()
        if storage.data_ptr() not in watched:
            watched.add(storage.data_ptr())
            library.counting_memory(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))
        return t.data_ptr()

    with mock.patch.object(ops, "emulator", lambda: module), mock.patch.object(ops, "_address", address):
        getattr(ops, op)(*args, **kwargs)
    found = ctypes.POINTER(_Launch)()
    count = library.counting_launches(ctypes.byref(found))
    return [found[i].whole() for i in range(count)]
