"""Rank file: what one rank writes of a checkpoint. Torch files that everybody can read, and behind them what only we need.

Think of a printed score with the conductor's notes at its end: every musician can play from it, and who conducts turns to the back page.

    items    one torch file (torchfile.py) per tensor that this rank writes, each at a multiple of 64; perhaps one zstd frame of it
    extras   the same for what else torch's own checkpoints have: module buffers, settings of optimizers, counters (extras.py)
    tail     MessagePack of `Tail`: the snapshot's head (header, layout, own state), and where each item lies, with its digest

Contract: `write` reads its source once and needs no memory of the state's size; what it returns names the tail's place and digest, which
the manifest lists: from there every byte is under a digest. Of twins (layout.py) each writes its share. `fill_payload` puts a whole
payload together again, from the files of all twins, straight into its memory; whoever calls it checks the snapshot's stamp afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec
import xxhash
import zstandard

from resilient.checkpoint import extras, layout
from resilient.checkpoint.layout import Layout, Row
from resilient.checkpoint.output import Output, put
from resilient.checkpoint.source import Source
from resilient.checkpoint.storage import Input
from resilient.checkpoint.tally import PIECE, Tally, tensor_digest
from resilient.checkpoint.torchfile import cover
from resilient.errors import SnapshotCorrupt

PAGE: Final = 4096
_PAGED_MIN: Final = 1 << 20  # of smaller ones a copy costs less than half a page in the file
TAIL_BYTES_MAX: Final = 1 << 30
ZSTD: Final = "stream.zstd/1"  # as torch.distributed.checkpoint names it


class Item(msgspec.Struct, frozen=True, array_like=True):
    """A tensor's place in the file."""

    row: int  # its number in the layout
    offset: int
    length: int
    memory_at: int  # of the tensor's memory, from the begin of the torch file
    codec: str = ""  # "" or ZSTD: of the whole torch file
    stored: bytes = b""  # xxh3_128 of that frame


class Extra(msgspec.Struct, frozen=True, array_like=True):
    """Something that is not in the payload."""

    key: str
    path: tuple[str | int, ...]  # the keys under which a nested state dict has it
    offset: int
    length: int
    digest: bytes  # xxh3_128 of all of it
    dtype: str = ""  # of a tensor; "" for any other value
    shape: tuple[int, ...] = ()


class Tail(msgspec.Struct, frozen=True, array_like=True):
    """The end of a rank file."""

    head: bytes
    digests: tuple[bytes, ...]  # of each of the rank's tensors (tally.py), whoever wrote it
    items: tuple[Item, ...]
    extras: tuple[Extra, ...]


class Written(NamedTuple):
    """What a manifest has to say of a file."""

    num_bytes: int
    tail_at: int
    digest: str  # xxh3_128 of the tail, hex


def write(output: Output, source: Source, *, level: int = 0) -> Written:
    """The whole file. level: of zstandard, 0 = as it is. Raises as `Source`, SnapshotCorrupt for a layout that is none."""
    found = source.found
    if not found.layout:
        raise SnapshotCorrupt(f"snapshot rank={found.rank} step={found.step}: a layout expected, none found")
    tally = Tally(found.layout, len(found.payload))
    described, owners, items = tally.layout, tally.layout.owners(), list[Item]()
    item: _Plain | _Frame | None = None
    for part in tally.parts:
        view = source.view(part.begin, part.end)
        tally.add(part, view)
        for number in part.rows:
            if owners[number] != found.rank:
                continue
            begin, length = tally.places[number]
            if item is None:
                _align(output)
                row = described.rows[number]
                item = _Frame(output, number, row, level) if level else _Plain(output, number, row, begin)
            item.add(view[max(begin - part.begin, 0) : begin + length - part.begin])
            if begin + length <= part.end:
                items.append(item.end())
                item = None
    head = source.finish(tally.digest())
    others = tuple(_write_extra(output, extra) for extra in extras.of(found.own, described)) if found.rank == described.twins.first else ()
    _align(output)
    tail_at = output.position
    tail = msgspec.msgpack.encode(Tail(head, tally.rows(), tuple(items), others))
    put(output, tail)
    return Written(output.position, tail_at, xxhash.xxh3_128_hexdigest(tail))


class _Plain:
    """An item as it is. A large tensor's memory begins where in a page it does in the payload, too: so it can be written from there."""

    def __init__(self, output: Output, number: int, row: Row, begin: int) -> None:
        self._output, self._number, self._offset = output, number, output.position
        self._covers = cover(row.dtype, row.local)
        if self._covers.num_bytes >= _PAGED_MIN:
            shortest = len(self._covers.front)
            self._covers = cover(row.dtype, row.local, at=shortest + (begin - self._offset - shortest) % PAGE)
        put(output, self._covers.front)

    def add(self, view: memoryview) -> None:
        """The next bytes of the tensor's memory."""
        self._output.lend(view)

    def end(self) -> Item:
        """That was all of it."""
        put(self._output, self._covers.back)
        return Item(self._number, self._offset, self._output.position - self._offset, len(self._covers.front))


class _Frame:
    """An item as one zstd frame."""

    def __init__(self, output: Output, number: int, row: Row, level: int) -> None:
        self._output, self._number, self._offset = output, number, output.position
        self._covers, self._digest = cover(row.dtype, row.local), xxhash.xxh3_128()
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj()
        self.add(self._covers.front)

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes of the torch file."""
        self._put(self._compressor.compress(data))

    def end(self) -> Item:
        """As _Plain.end."""
        self.add(self._covers.back)
        self._put(self._compressor.flush())
        length = self._output.position - self._offset
        return Item(self._number, self._offset, length, len(self._covers.front), ZSTD, self._digest.digest())

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        put(self._output, data)


def _write_extra(output: Output, extra: extras.Value) -> Extra:
    _align(output)
    offset, whole = output.position, b"".join(extra.pieces())
    put(output, whole)
    return Extra(extra.key, extra.path, offset, len(whole), xxhash.xxh3_128_digest(whole), extra.dtype, extra.shape)


def _align(output: Output) -> None:
    put(output, bytes(-output.position % layout.ALIGN))


# --------------------------------------------------------------------------- reading


def read_tail(file: Input, num_bytes: int, tail_at: int, digest: str) -> Tail:
    """The end of a file, as the manifest describes it. Raises SnapshotCorrupt."""
    if not 0 <= num_bytes - tail_at <= TAIL_BYTES_MAX:
        raise SnapshotCorrupt(f"a tail of {num_bytes - tail_at} bytes announced")
    data = bytearray(num_bytes - tail_at)
    file.fill(memoryview(data), tail_at)
    return parse_tail(data, digest)


def parse_tail(data: bytes | bytearray, digest: str) -> Tail:
    """The bytes of one. Raises SnapshotCorrupt."""
    if (found := xxhash.xxh3_128_hexdigest(data)) != digest:
        raise SnapshotCorrupt(f"its tail: digest {digest} expected, {found} found")
    try:
        return msgspec.msgpack.decode(data, type=Tail)
    except msgspec.DecodeError as error:
        raise SnapshotCorrupt(f"its tail: {error}") from error


def fill_row(file: Input, item: Item, row: Row, view: memoryview, digest: bytes = b"") -> None:
    """A tensor's memory. digest: what it must have; without it that is left to the caller. Raises SnapshotCorrupt."""
    if len(view) != row.num_bytes:
        raise SnapshotCorrupt(f"{row.key}: {row.num_bytes} bytes expected, {len(view)} found")
    if item.codec == "":
        file.fill(view, item.offset + item.memory_at)
    elif item.codec == ZSTD:
        _decompress(file, item, view)
    else:
        raise SnapshotCorrupt(f"{row.key}: stored as {item.codec!r}, {ZSTD!r} or nothing expected")
    if digest and tensor_digest(view) != digest:
        raise SnapshotCorrupt(f"{row.key} is not what was written")


def check_items(file: Input, tail: Tail, described: Layout) -> None:
    """The memory of every tensor in this file. Raises SnapshotCorrupt naming the tensor."""
    spare = memoryview(bytearray(max((described.rows[item.row].num_bytes for item in tail.items), default=0)))
    for item in tail.items:
        row = described.rows[item.row]
        fill_row(file, item, row, spare[: row.num_bytes], tail.digests[item.row])


def check_rest(file: Input, tail: Tail, described: Layout, tail_at: int) -> None:
    """Every other byte before the tail: what other readers need. Raises SnapshotCorrupt naming the tensor."""
    end = 0
    entries: tuple[Item | Extra, ...] = (*tail.items, *tail.extras)
    for entry in entries:
        _check_gap(file, end, entry.offset)
        end = entry.offset + entry.length
        if isinstance(entry, Item):
            if not _frame_is_sound(file, entry, row := described.rows[entry.row]):
                raise SnapshotCorrupt(f"{row.key}: the frame of its torch file is not what was written")
        elif _digest(file, entry.offset, entry.length) != entry.digest:
            raise SnapshotCorrupt(f"{entry.key} is not what was written")
    _check_gap(file, end, tail_at)


def _check_gap(file: Input, begin: int, end: int) -> None:
    gap = bytearray(max(0, end - begin))
    file.fill(memoryview(gap), begin)
    if begin > end or any(gap):
        raise SnapshotCorrupt(f"zeros expected from byte {begin} to {end}, something else found")


def _frame_is_sound(file: Input, item: Item, row: Row) -> bool:
    """What stands around the memory: other readers need it."""
    if item.codec:
        return _digest(file, item.offset, item.length) == item.stored
    try:
        covers = cover(row.dtype, row.local, at=item.memory_at)
    except ValueError:
        return False
    back_at = item.memory_at + covers.num_bytes
    if (item.memory_at, item.length) != (len(covers.front), back_at + len(covers.back)):
        return False
    for offset, expected in ((0, covers.front), (back_at, covers.back)):
        found = bytearray(len(expected))
        file.fill(memoryview(found), item.offset + offset)
        if found != expected:
            return False
    return True


def _digest(file: Input, offset: int, length: int) -> bytes:
    digest, spare = xxhash.xxh3_128(), memoryview(bytearray(min(PIECE, length)))
    for start in range(0, length, PIECE):
        piece = spare[: min(PIECE, length - start)]
        file.fill(piece, offset + start)
        digest.update(piece)
    return digest.digest()


def _decompress(file: Input, item: Item, view: memoryview) -> None:
    source: Any = _Pieces(file, item.offset, item.length)
    stream = zstandard.ZstdDecompressor().stream_reader(source)
    front, done = item.memory_at, 0
    try:
        while front:
            got = len(stream.read(min(front, PIECE)))
            if not got:
                raise SnapshotCorrupt("a frame that ends early")
            front -= got
        while done < len(view):
            count = stream.readinto(view[done : done + PIECE])
            if not count:
                raise SnapshotCorrupt("a frame that ends early")
            done += count
        while stream.read(PIECE):  # to its end, where its checksum stands
            pass
    except zstandard.ZstdError as error:
        raise SnapshotCorrupt(f"a frame that cannot be read: {error}") from error


class _Pieces:
    """Part of a file as something with `read`."""

    def __init__(self, file: Input, offset: int, length: int) -> None:
        self._file, self._at, self._end = file, offset, offset + length

    def read(self, count: int) -> bytes:
        data = bytearray(min(count, self._end - self._at))
        self._file.fill(memoryview(data), self._at)
        self._at += len(data)
        return bytes(data)


def shares(described: Layout, rank: int) -> Iterable[tuple[int, int]]:
    """(row, rank that wrote it), of all rows."""
    return enumerate(described.owners()) if rank in described.twins.ranks else ((n, rank) for n in range(len(described.rows)))
