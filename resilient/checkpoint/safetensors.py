"""Safetensors: the file format in which Hugging Face users keep weights.

Think of a parcel with its packing list taped to the front: the length of the list, the list, and then the goods, in the order and at the
places that it names.

    8 bytes    length of the header, little-endian
    header     JSON: name -> dtype, shape, data_offsets [begin, end) counted from the header's end; `__metadata__`: words
    data       the tensors' memory, contiguous and little-endian, without gaps

Contract: pure, or from an `Input`; no tensor is read here. `header` puts tensors of the widest dtype first, so that each is aligned.
`read_header` refuses what the format forbids: gaps, overlaps, lengths that do not fit, unknown dtypes.
Sources: the format's page in the repository huggingface/safetensors; transformers wants the word `format: pt`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from resilient.checkpoint.layout import ITEMSIZES
from resilient.checkpoint.storage import Input
from resilient.errors import CheckpointError, SnapshotCorrupt

SUFFIX: Final = ".safetensors"
INDEX: Final = "model.safetensors.index.json"
HEADER_BYTES_MAX: Final = 100_000_000  # as the official library
DTYPES: Final = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
_NAMES: Final = {short: dtype for dtype, short in DTYPES.items()}


class Place(NamedTuple):
    """A tensor in such a file."""

    name: str
    dtype: str  # as torch spells it
    shape: tuple[int, ...]
    begin: int  # from the file's first byte
    num_bytes: int


def header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[Place]]:
    """What stands before the data, and where each tensor comes, in the order in which they are to be written.

    tensors: (name, dtype, shape). Raises CheckpointError for a dtype that the format does not have.
    """
    rows = []
    for name, dtype, shape in tensors:
        if dtype not in DTYPES:
            raise CheckpointError(f"{name}: safetensors has no {dtype}; one of {', '.join(DTYPES)} expected")
        rows.append((-ITEMSIZES[dtype], name, dtype, shape))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    for _, name, dtype, shape in sorted(rows):
        num_bytes = math.prod(shape) * ITEMSIZES[dtype]
        described[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [end, end + num_bytes]}
        places.append((name, dtype, shape, end, num_bytes))
        end += num_bytes
    text = msgspec.json.encode(described)
    text += b" " * (-len(text) % 8)
    front = len(text).to_bytes(8, "little") + text
    return front, [Place(name, dtype, shape, len(front) + begin, count) for name, dtype, shape, begin, count in places]


class _Described(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(file: Input, num_bytes: int) -> dict[str, Place]:
    """The tensors of a file of that length, by name. Raises SnapshotCorrupt."""
    head = bytearray(8)
    file.fill(memoryview(head), 0)
    length = int.from_bytes(head, "little")
    if length > min(HEADER_BYTES_MAX, num_bytes - 8):
        raise SnapshotCorrupt(f"not a safetensors file: a header of {length} bytes announced, in a file of {num_bytes}")
    text = bytearray(length)
    file.fill(memoryview(text), 8)
    try:
        found = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        found.pop("__metadata__", None)
        described = {name: msgspec.json.decode(raw, type=_Described) for name, raw in found.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotCorrupt(f"not a safetensors file: its header: {error}") from error
    places, end = {}, 0
    for name, row in sorted(described.items(), key=lambda pair: pair[1].data_offsets):
        if row.dtype not in _NAMES:
            raise SnapshotCorrupt(f"{name}: dtype {row.dtype!r} found, one of {', '.join(_NAMES)} expected")
        dtype, (begin, stop) = _NAMES[row.dtype], row.data_offsets
        wanted = math.prod(row.shape) * ITEMSIZES[dtype]
        if min(row.shape, default=0) < 0 or begin != end or stop - begin != wanted:
            raise SnapshotCorrupt(f"{name}: {wanted} bytes from {end} on expected, {begin} to {stop} announced")
        places[name] = Place(name, dtype, row.shape, 8 + length + begin, wanted)
        end = stop
    if 8 + length + end != num_bytes:
        raise SnapshotCorrupt(f"{8 + length + end} bytes expected, {num_bytes} found")
    return places
