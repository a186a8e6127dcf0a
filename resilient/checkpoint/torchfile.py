"""Torch file: the bytes that make raw tensor memory something that `torch.load` reads, made without torch.

Think of a book's cover: the pages are what they are; front and back make a book of them that every library takes.

A tensor that `torch.save` wrote is a zip archive of uncompressed entries: a pickle that says how to rebuild the tensor, and the memory of
its storage. Only the memory is large, and it is one piece; so `cover` gives what stands before it and what after it, and whoever writes a
checkpoint writes front, memory, back, without a copy. `torch.distributed.checkpoint` reads each tensor of a checkpoint in this form.

Contract: pure functions. `cover(dtype, shape)` fits `math.prod(shape) * itemsize` bytes of contiguous little-endian memory, which begin
at a multiple of 64 from the front's first byte, or where the caller says. The entry's CRC-32 is optional: torch does not look at it;
other zip tools do. Zip64 beyond 4 GiB. Format: APPNOTE 6.3.10 of the zip format, sections 4.3 and 4.5.3; torch/serialization.py and
caffe2/serialize/inline_container.cc for the entries.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from resilient.checkpoint.layout import ALIGN, ITEMSIZES
from resilient.checkpoint.pickling import Call, Global, Persistent, encode

# dtype as torch spells it: its typed storage; None: torch saves it with an untyped storage and its dtype
STORAGES: Final[dict[str, str | None]] = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
    "uint16": None,
    "uint32": None,
    "uint64": None,
    "float8_e4m3fn": None,
    "float8_e5m2": None,
    "float8_e4m3fnuz": None,
    "float8_e5m2fnuz": None,
    "float8_e8m0fnu": None,
}
_ROOT: Final = "archive"
_LIMIT: Final = 0xFFFFFFFF  # sizes and offsets from here on need zip64
_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = 0x04034B50, 0x02014B50, 0x06054B50, 0x06064B50, 0x07064B50
_PADDING_ID, _ZIP64_ID = 0x4246, 0x0001  # extra fields: torch's own padding; APPNOTE 4.5.3
_PADDING_MAX: Final = 0xFF00  # all extra fields together have 16 bits for their length


class Cover(NamedTuple):
    """What stands before and after the memory."""

    front: bytes
    back: bytes
    num_bytes: int  # of the memory in between


def cover(dtype: str, shape: Sequence[int], *, crc32: int = 0, at: int = 0) -> Cover:
    """Front and back for a contiguous tensor. at: how long the front is to be; 0 = as short as can be.

    Raises ValueError for a dtype that torch cannot save in this form, and for an `at` that cannot be.
    """
    return _cover(dtype, tuple(shape), crc32, at)


@functools.lru_cache(512)  # layers are alike; an entry has a kilobyte or five
def _cover(dtype: str, shape: tuple[int, ...], crc32: int, at: int) -> Cover:
    if dtype not in STORAGES:
        msg = f"a torch file of dtype {dtype!r}: one of {', '.join(STORAGES)} expected"
        raise ValueError(msg)
    num_bytes = math.prod(shape) * ITEMSIZES[dtype]
    archive = _Archive()
    archive.small("data.pkl", _pickle(dtype, shape))
    archive.small("byteorder", b"little")
    archive.large("data/0", num_bytes, crc32, at)
    front = archive.taken()
    archive.small("version", b"3\n")
    archive.finish()
    return Cover(front, archive.taken(), num_bytes)


def cover_value(pickled: bytes) -> bytes:
    """A whole torch file of something without tensors, given as its pickle (protocol 2)."""
    archive = _Archive()
    for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
        archive.small(name, data)
    archive.finish()
    return archive.taken()


class _Archive:
    """Bytes of a zip archive, as they come; `offset` counts the large entry too."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._offset = 0
        self._central = bytearray()
        self._count = 0

    def taken(self) -> bytes:
        found = bytes(self._bytes)
        self._bytes.clear()
        return found

    def small(self, name: str, data: bytes) -> None:
        self._entry(name, len(data), zlib.crc32(data))
        self._put(data)

    def large(self, name: str, num_bytes: int, crc32: int, at: int) -> None:
        """Its bytes are written by somebody else, between what is taken before and after."""
        self._entry(name, num_bytes, crc32, at)
        self._offset += num_bytes

    def finish(self) -> None:
        begin, size = self._offset, len(self._central)
        self._put(bytes(self._central))
        if begin + size >= _LIMIT:
            end64 = self._offset
            self._put(struct.pack("<IQHHIIQQQQ", _END64, 44, 45, 45, 0, 0, self._count, self._count, size, begin))
            self._put(struct.pack("<IIQI", _LOCATOR64, 0, end64, 1))
        self._put(struct.pack("<IHHHHIIH", _END, 0, 0, self._count, self._count, size, min(begin, _LIMIT), 0))

    def _put(self, data: bytes) -> None:
        self._bytes += data
        self._offset += len(data)

    def _entry(self, name: str, size: int, crc32: int, at: int = 0) -> None:
        path, begin = f"{_ROOT}/{name}".encode(), self._offset
        big = size >= _LIMIT or begin >= _LIMIT
        sizes = struct.pack("<HHQQ", _ZIP64_ID, 16, size, size) if big else b""
        room = begin + 30 + len(path) + len(sizes) + 4  # where data would begin with an empty padding
        spare = at - room if at else -room % ALIGN
        if not 0 <= spare < _PADDING_MAX:
            msg = f"a torch file whose memory begins at {at}: {room} to {room + _PADDING_MAX} expected"
            raise ValueError(msg)
        padding = struct.pack("<HH", _PADDING_ID, spare) + b"Z" * spare
        shown, version = _LIMIT if big else size, 45 if big else 0
        fixed = struct.pack("<HHHHHIII", version, 0, 0, 0, 0, crc32, shown, shown)
        self._put(struct.pack("<I", _LOCAL) + fixed + struct.pack("<HH", len(path), len(sizes) + len(padding)) + path + sizes + padding)
        where = struct.pack("<HHQQQ", _ZIP64_ID, 24, size, size, begin) if big else b""
        self._central += struct.pack("<IH", _CENTRAL, 0) + fixed + struct.pack("<HHHHHI", len(path), len(where), 0, 0, 0, 0)
        self._central += struct.pack("<I", _LIMIT if big else begin) + path + where
        self._count += 1


def _pickle(dtype: str, shape: Sequence[int]) -> bytes:
    """A call of torch's rebuilding function."""
    storage, itemsize = STORAGES[dtype], ITEMSIZES[dtype]
    count, strides, stride = math.prod(shape), [], 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= max(length, 1)
    kind = Global("torch", storage) if storage else Global("torch.storage", "UntypedStorage")
    memory = Persistent(("storage", kind, "0", "cpu", count if storage else count * itemsize))
    place = (memory, 0, tuple(shape), tuple(strides[::-1]), False, Call(Global("collections", "OrderedDict"), ()))
    if storage:
        return encode(Call(Global("torch._utils", "_rebuild_tensor_v2"), place), protocol=2)
    return encode(Call(Global("torch._utils", "_rebuild_tensor_v3"), (*place, Global("torch", dtype))), protocol=2)
