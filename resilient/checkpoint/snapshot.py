"""Snapshot: the state of one rank at one step, as bytes that are the same in memory, on the peer and on disk.

Think of a sealed letter: the writer breaks the old seal first, writes, and presses the new seal last. Whoever finds a whole
seal may read; whoever finds none, or one that does not fit the letter, puts it away. The writer may die at any word.

Contract: the seal is one aligned 8-byte word, stored last, so a process killed anywhere leaves an unsealed slot, never a torn
snapshot. Header, layout and own state are under a digest made by the writer; the payload's digest (large) is made by the agent
afterwards ("stamped") and names the seal it belongs to. Nothing leaves this node unstamped. One writer per slot at a time;
any number of readers, which check after reading that the seal has not moved. Who copies asks the writer to wait (hold.py).

Bytes: 256 of header (32 little-endian int64 words), layout, own, zeros up to a multiple of 4096, payload.
    word 0      magic and format version: "RSSNAP", two digits
    word 1      seal: generation << 32 | step + 1; lower half zero = not sealed. The generation counts writes; it is local to
                this memory and zero in bytes that travel
    word 2      echo: ~seal, stored just before it, so that a flipped bit in either is seen
    word 3..5   stamp: the seal it belongs to, the payload's digest (tally.py); written by the agent
    word 6..7   xxh3_128 over words 8..31, layout and own
    word 8..    step, rank, world_size, round, layout bytes, own bytes, payload offset, payload bytes, xxh3_128 of the run id

Numbers: writing 16 KB of own state costs about 10 us (one copy, one hash). A payload costs its writer one copy and no hash.
Rejected: a sequence number on both sides of the data (says nothing about a flipped bit); the payload hashed by its writer
(0.12 s per GB inside the step); a trailer instead of a seal in front (its place would depend on the sizes it vouches for).
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from resilient.checkpoint.tally import payload_digest
from resilient.errors import SnapshotCorrupt, SnapshotMismatch, SnapshotMissing

ALIGN: Final = 4096
HEADER_BYTES: Final = 256
SNAPSHOT_BYTES_MAX: Final = 1 << 40  # of what others announce: whether there is room is seen when it is made, this only keeps nonsense out
MAGIC: Final = 0x3230_5041_4E53_5352  # "RSSNAP02"
SEAL, ECHO, STAMP, STEP, WORLD_SIZE = 1, 2, 3, 8, 10  # words
LAYOUT_BYTES, OWN_BYTES, PAYLOAD_AT, PAYLOAD_BYTES = 12, 13, 14, 15
STAMP_ALL: Final = slice(24, 48)
PAYLOAD_DIGEST: Final = slice(32, 48)
HEAD_DIGEST: Final = slice(48, 64)
BODY: Final = slice(64, HEADER_BYTES)  # words 8..31
FIELDS: Final = struct.Struct("<8q16s112x")  # exactly the body: step ... payload bytes, digest of the run id, zeros
SEALED: Final = 0xFFFF_FFFF  # lower half of the seal word: step + 1

Buffer = bytes | bytearray | memoryview | mmap.mmap


@dataclass(frozen=True)
class Snapshot:
    """What a sealed snapshot says. `payload` is a view of the memory it was read from: valid until that is written again."""

    step: int
    rank: int
    world_size: int
    round: int
    layout: bytes
    own: bytes
    payload: memoryview  # (payload_bytes,) uint8, host
    num_bytes: int  # header .. payload end
    stamped: bool  # the payload's digest is known (and, with verify, was found right)


def slot_bytes(layout_bytes: int, own_bytes: int, payload_bytes: int) -> int:
    """Bytes a slot must have to hold a snapshot of these sizes."""
    return payload_offset(layout_bytes, own_bytes, payload_bytes) + payload_bytes


def parse(
    memory: Buffer,
    *,
    header: bytes | None = None,
    run: str | None = None,
    rank: int | None = None,
    step: int | None = None,
    verify: bool = True,
    stamped: bool = False,
    hashed: bytes | None = None,
    threads: int = 1,
    where: str = "memory",
) -> Snapshot:
    """Read a snapshot out of any bytes and check all that can be checked.

    `run`, `rank`, `step`: what is expected, None = anything. `header`: stands in for the first 256 bytes of `memory`.
    `verify=False` skips the payload's digest. `hashed`: it is known already. `stamped=True` refuses a payload that nobody has hashed.
    `threads`: how many may hash it.
    Raises SnapshotMissing (no seal), SnapshotCorrupt, SnapshotMismatch (sound, but another one).
    """
    view = memoryview(memory).cast("B").toreadonly()
    if len(view) < HEADER_BYTES:
        raise SnapshotCorrupt(f"snapshot: {HEADER_BYTES} bytes of header expected, {len(view)} found ({where})")
    header = bytes(view[:HEADER_BYTES]) if header is None else header
    num_bytes = announced_bytes(header, where)
    words = memoryview(header).cast("q")
    if num_bytes > len(view):
        raise SnapshotCorrupt(f"{_subject(header)}: {num_bytes} bytes expected, {len(view)} found ({where})")
    found = parse_head(header, view[HEADER_BYTES : words[PAYLOAD_AT]], run=run, rank=rank, step=step, where=where)
    subject, payload = _subject(header), view[words[PAYLOAD_AT] : num_bytes]
    if not payload and any(header[STAMP_ALL]):
        raise SnapshotCorrupt(f"{subject}: a stamp where there is no payload ({where})")
    is_stamped = words[STAMP] == words[SEAL] or not payload
    if stamped and not is_stamped:
        raise SnapshotCorrupt(f"{subject}: its payload was not hashed under this seal ({where})")
    if verify and is_stamped and payload:
        try:
            digest = hashed or payload_digest(found.layout, payload, threads=threads)
        except SnapshotCorrupt as error:
            raise SnapshotCorrupt(f"{subject}: {error} ({where})") from error
        if digest != header[PAYLOAD_DIGEST]:
            raise SnapshotCorrupt(f"{subject}: the payload is not what was hashed ({where})")
    return dataclasses.replace(found, payload=payload, stamped=is_stamped)


def parse_head(
    header: bytes, head: Buffer, *, run: str | None = None, rank: int | None = None, step: int | None = None, where: str = "memory"
) -> Snapshot:
    """As `parse`, of all that comes before the payload: `head` is what lies between the header and that. `payload` is empty."""
    num_bytes = announced_bytes(header, where)
    words = memoryview(header).cast("q")
    found_step, found_rank, world_size, round_, layout_len, own_len, payload_at, _, found_run = FIELDS.unpack(header[BODY])
    subject, view = _subject(header), memoryview(head)
    end = layout_len + own_len
    if len(view) != payload_at - HEADER_BYTES or not _is_sound(header, bytes(view[:end])) or any(view[end:]):
        raise SnapshotCorrupt(f"{subject}: header, layout or own state are not what was sealed ({where})")
    if words[ECHO] != ~words[SEAL] or (words[SEAL] & SEALED) - 1 != found_step:
        raise SnapshotCorrupt(f"{subject}: the seal {words[SEAL]:#x} is not that of its header ({where})")
    if run is not None and xxhash.xxh3_128_digest(run.encode()) != found_run:
        raise SnapshotMismatch(f"{subject}: run {run!r} expected, another run's found ({where})")
    for name, wanted, there in (("rank", rank, found_rank), ("step", step, found_step)):
        if wanted is not None and wanted != there:
            raise SnapshotMismatch(f"{subject}: {name} {wanted} expected, {there} found ({where})")
    layout, own = bytes(view[:layout_len]), bytes(view[layout_len:end])
    is_stamped = words[STAMP] == words[SEAL]
    return Snapshot(found_step, found_rank, world_size, round_, layout, own, memoryview(b""), num_bytes, is_stamped)


def layout_at(header: bytes, body: memoryview) -> bytes:
    """The layout with which the bytes behind this header begin. Raises SnapshotCorrupt if these, or own state, are not what was sealed."""
    words = memoryview(header).cast("q")
    head = bytes(body[: words[LAYOUT_BYTES] + words[OWN_BYTES]])
    if not _is_sound(header, head):
        raise SnapshotCorrupt("header, layout or own state are not what was sealed")
    return head[: words[LAYOUT_BYTES]]


def _subject(header: bytes) -> str:
    step, rank, *_ = FIELDS.unpack(header[BODY])
    return f"snapshot rank={rank} step={step}"


def _is_sound(header: bytes, head: bytes) -> bool:
    return xxhash.xxh3_128_digest(header[BODY] + head) == header[HEAD_DIGEST]


def layout_of(head: bytes) -> bytes:
    """The layout in a head (all before the payload) whose digest was checked."""
    return head[HEADER_BYTES : HEADER_BYTES + memoryview(head[:HEADER_BYTES]).cast("q")[LAYOUT_BYTES]]


def own_of(head: bytes) -> bytes:
    """The own state in such a head."""
    words = memoryview(head[:HEADER_BYTES]).cast("q")
    begin = HEADER_BYTES + words[LAYOUT_BYTES]
    return head[begin : begin + words[OWN_BYTES]]


def stamped_digest(header: bytes) -> bytes:
    """The payload's digest, as a stamped header says."""
    return bytes(header[PAYLOAD_DIGEST])


def announced_bytes(header: bytes, where: str = "header") -> int:
    """Length of the whole snapshot that begins with this header. Raises SnapshotMissing, SnapshotCorrupt; checks no digest."""
    if len(header) != HEADER_BYTES:
        raise SnapshotCorrupt(f"snapshot: {HEADER_BYTES} bytes of header expected, {len(header)} found ({where})")
    words = memoryview(header).cast("q")
    if words[SEAL] & SEALED == 0:
        raise SnapshotMissing(f"snapshot: not sealed, so there is none here ({where})")
    if words[0] != MAGIC:
        raise SnapshotCorrupt(f"snapshot: format mark {_mark(MAGIC)} expected, {_mark(words[0])} found ({where})")
    layout, own, payload_at, payload = words[LAYOUT_BYTES : PAYLOAD_BYTES + 1]
    if min(layout, own, payload) < 0 or payload_at != payload_offset(layout, own, payload):
        raise SnapshotCorrupt(f"snapshot: sizes {layout}, {own}, {payload_at}, {payload} cannot be ({where})")
    return payload_at + payload


def payload_offset(layout_bytes: int, own_bytes: int, payload_bytes: int) -> int:
    """Where the payload begins."""
    head_end = HEADER_BYTES + layout_bytes + own_bytes
    return -(-head_end // ALIGN) * ALIGN if payload_bytes else head_end


def _mark(word: int) -> str:
    return repr(word.to_bytes(8, "little", signed=True).decode("latin-1"))
