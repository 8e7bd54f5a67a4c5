"""Records: what one model with one method did to every image of a data set, in one file.

    header    4096 bytes: "tokred record 1", a line feed, the fields of `Header` as JSON, spaces
    rows      one for each image, of one size, little endian:
        image      16 bytes            BLAKE2b of the image file
        label      int32               its class, -1 if unknown
        top1       int32               the class that the model says
        pattern    int16 [S, P]        after each of the S blocks that reduce, as in `tokred_kernels.analysis.patterns`
        feature    float32 [F, C]      the class token after each of F blocks
        check      uint32              CRC-32 of the row up to here

A row is there or not: a kill leaves at most a part of one at the end, which the next `Writer` cuts off. Reading maps
the file into memory. 50,000 images, 12 blocks that reduce 196 patches and 4 features of width 384 are 0.54 GB.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .pattern import depths

MAGIC = b"tokred record 1\n"
HEADER_BYTES = 4096


@dataclass(frozen=True)
class Header:
    """What a record is of.

    Attributes:
        dataset, model: their names. weights: in words, such as "random (seed 0)". fingerprint: of the parameters.
        method: its name, "dense" for none. keep_rate: that the options were chosen for, None for dense.
        options: those of `tokred_kernels.apply`. untrained: the method has learned parts, which are random.
        depth: blocks of the model. grid: [rows, columns] of patches. prefix: tokens before the patches.
        blocks: those that reduce, ascending. feature_blocks: those after which the class token is kept; width: its C.
    """

    dataset: str
    model: str
    weights: str
    fingerprint: str
    method: str
    keep_rate: float | None
    options: dict
    untrained: bool
    depth: int
    grid: Sequence[int]
    prefix: int
    blocks: Sequence[int]
    feature_blocks: Sequence[int]
    width: int

    @property
    def row(self) -> np.dtype:
        rows, columns = self.grid
        fields = [
            ("image", "<u8", (2,)),
            ("label", "<i4"),
            ("top1", "<i4"),
            ("pattern", "<i2", (len(self.blocks), rows * columns)),
            ("feature", "<f4", (len(self.feature_blocks), self.width)),
            ("check", "<u4"),
        ]
        return np.dtype(fields)

    def to_bytes(self) -> bytes:
        data = MAGIC + json.dumps(dataclasses.asdict(self)).encode()
        if len(data) > HEADER_BYTES:
            raise ValueError(f"record: a header must be {HEADER_BYTES} bytes at most, got {len(data)}")
        return data.ljust(HEADER_BYTES)


def read_header(path: Path) -> Header:
    """The header of the record at `path`.

    Raises:
        ValueError: the file is no record, or its header is damaged.
    """
    with open(path, "rb") as file:
        data = file.read(HEADER_BYTES)
    if not data.startswith(MAGIC):
        raise ValueError(f"{path} is no record of this version")
    try:
        found = Header(**json.loads(data[len(MAGIC) :]))
        _ = found.row
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from None
    return found


class Writer:
    """Appends images to the record at `path`; makes it, or goes on where the last one stopped.

        with Writer(path, header) as writer:
            writer.append(image, label, top1, pattern, feature)

    `count` images are there already. What a kill left of a row, and rows at the end that do not pass their check, are
    cut off first.

    Raises:
        ValueError: the file is another record, or none. BlockingIOError: another process appends to it.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._row = header.row
        if not path.exists():
            fresh = path.with_name(f"{path.name}.{os.getpid()}")
            fresh.write_bytes(header.to_bytes())
            os.replace(fresh, path)
        there, wanted = (json.loads(json.dumps(dataclasses.asdict(h))) for h in (read_header(path), header))
        for field in wanted:
            if there[field] != wanted[field]:
                raise ValueError(f"{path} was recorded with {field} {there[field]!r}, not {wanted[field]!r}")
        self._file = open(path, "r+b")  # noqa: SIM115 (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.count = self._sound()
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(HEADER_BYTES + self.count * self._row.itemsize)
        self._file.seek(0, os.SEEK_END)

    def _sound(self) -> int:
        """The rows up to the last that passes its check."""
        size = self._row.itemsize
        count = (self._file.seek(0, os.SEEK_END) - HEADER_BYTES) // size
        while count:
            self._file.seek(HEADER_BYTES + (count - 1) * size)
            if _passes(np.frombuffer(self._file.read(size), self._row))[0]:
                break
            count -= 1
        return count

    def append(self, image, label, top1, pattern, feature) -> None:
        """Adds n images: image [n, 2] uint64, label [n], top1 [n], pattern [n, S, P], feature [n, F, C]."""
        rows = np.zeros(len(image), self._row)
        given = {"image": image, "label": label, "top1": top1, "pattern": pattern, "feature": feature}
        for name, values in given.items():
            values = np.asarray(values)
            if values.shape != rows[name].shape:
                raise ValueError(f"record: {name} must be {list(rows[name].shape)}, got {list(values.shape)}")
            rows[name] = values
        rows["check"] = _checks(rows)
        self._file.write(rows.tobytes())
        self._file.flush()
        self.count += len(rows)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.closing(self._file):
            os.fsync(self._file)


class Record:
    """A record, read only, mapped into memory.

    Attributes:
        header: see `Header`. rows: all images as a structured array, on disk until they are touched.

    Raises:
        ValueError: the file is no record, or was cut off within a row.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)
        row = self.header.row
        count, rest = divmod(path.stat().st_size - HEADER_BYTES, row.itemsize)
        if rest:
            raise ValueError(f"{path} is truncated: {count} images, and {rest} of the next one's {row.itemsize} bytes")
        self.rows = np.memmap(path, row, "r", HEADER_BYTES, (count,)) if count else np.zeros(0, row)

    def __len__(self) -> int:
        return len(self.rows)

    def verify(self) -> None:
        """Raises ValueError if a row is not what was written."""
        for start in range(0, len(self), 1024):
            wrong = np.flatnonzero(~_passes(self.rows[start : start + 1024]))
            if wrong.size:
                raise ValueError(f"{self.path} is damaged at image {start + wrong[0]}")

    def pattern(self, block: int) -> np.ndarray:
        """[n, P] int16 after `block`, which need not reduce.

        Raises:
            ValueError: the model has no such block.
        """
        header = self.header
        if not 0 <= block < header.depth:
            raise ValueError(f"{self.path} has no block {block}: {header.model} has {header.depth}")
        step = bisect_right(header.blocks, block) - 1
        if step >= 0:
            return self.rows["pattern"][:, step]
        P = header.grid[0] * header.grid[1]
        return np.broadcast_to(np.arange(header.prefix, header.prefix + P, dtype=np.int16), (len(self), P))

    def feature(self, block: int) -> np.ndarray:
        """[n, C] float32: the class token after `block`.

        Raises:
            ValueError: it was not recorded.
        """
        if block not in self.header.feature_blocks:
            have = ", ".join(map(str, self.header.feature_blocks)) or "none"
            raise ValueError(f"{self.path} has no features after block {block}; of blocks: {have}")
        return self.rows["feature"][:, list(self.header.feature_blocks).index(block)]

    def mean_depth(self) -> np.ndarray:
        """[rows, columns]: `depths` of each patch, the mean over the images, a thousand of them at a time."""
        header = self.header
        total = np.zeros(header.grid[0] * header.grid[1])
        for start in range(0, len(self), 1024):
            total += depths(self.rows["pattern"][start : start + 1024], header.blocks, header.depth).sum(0)
        return (total / len(self)).reshape(header.grid)


def check_comparable(records: Sequence[Record]) -> None:
    """Raises ValueError unless all records are of the same images in the same order, on the same grid of patches."""
    first = records[0]
    for other in records[1:]:
        names = f"{first.path} and {other.path}"
        if tuple(first.header.grid) != tuple(other.header.grid):
            grids = " and ".join("{}x{}".format(*record.header.grid) for record in (first, other))
            raise ValueError(f"different grids of patches, {grids}: {names}")
        if len(first) != len(other):
            raise ValueError(f"unequal image sets, {len(first)} and {len(other)} images: {names}")
        differ = np.flatnonzero((first.rows["image"] != other.rows["image"]).any(1))
        if differ.size:
            raise ValueError(f"unequal image sets, {differ.size} differ, the first is image {differ[0]}: {names}")


def _checks(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row without its last field."""
    data = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
    return np.array([zlib.crc32(row) for row in data[:, : rows.dtype.fields["check"][1]]], np.uint32)


def _passes(rows: np.ndarray) -> np.ndarray:
    return _checks(rows) == rows["check"]
