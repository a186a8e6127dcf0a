"""Snapshot: the state of one rank at one step, as bytes that are the same in memory, on the peer and on disk.

Think of a sealed letter: the writer breaks the old seal first, writes, and presses the new seal last. Whoever finds a whole
seal may read; whoever finds none, or one that does not fit the letter, puts it away. The writer may die at any word.

Contract: the seal is one aligned 8-byte word, stored last, so a process killed anywhere leaves an unsealed slot, never a torn
snapshot. Header, layout and own state are under a digest made by the writer; the payload's digest (large) is made by the agent
afterwards ("stamped") and names the seal it belongs to. Nothing leaves this node unstamped. One writer per slot at a time;
any number of readers, which check after reading that the seal has not moved. Who copies asks the writer to wait (hold.py).

Bytes: 256 of header (32 little-endian int64 words), layout, own, zeros up to a multiple of 4096, payload.
    word 0      magic and format version
    word 1      seal: generation << 32 | step + 1; lower half zero = not sealed. The generation counts writes; it is local to
                this memory and zero in bytes that travel
    word 2      echo: ~seal, stored just before it, so that a flipped bit in either is seen
    word 3..5   stamp: the seal it belongs to, xxh3_128 of the payload; written by the agent
    word 6..7   xxh3_128 over words 8..31, layout and own
    word 8..    step, rank, world_size, round, layout bytes, own bytes, payload offset, payload bytes, xxh3_128 of the run id

Numbers: writing 16 KB of own state costs about 10 us (one copy, one hash). A payload costs its writer one copy and no hash.
Rejected: a sequence number on both sides of the data (says nothing about a flipped bit); the payload hashed by its writer
(0.12 s per GB inside the step); a trailer instead of a seal in front (its place would depend on the sizes it vouches for).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import weakref
from dataclasses import dataclass
from typing import Final

import xxhash

from resilient.checkpoint import hold
from resilient.core.messages import NONE
from resilient.errors import SnapshotCorrupt, SnapshotMismatch, SnapshotMissing

ALIGN: Final = 4096
HEADER_BYTES: Final = 256
MAGIC: Final = 0x3130_5041_4E53_5352  # "RSSNAP01"
_SEAL, _ECHO, _STAMP, _STEP = 1, 2, 3, 8  # words
_LAYOUT_BYTES, _OWN_BYTES, _PAYLOAD_AT, _PAYLOAD_BYTES = 12, 13, 14, 15
_STAMP_ALL: Final = slice(24, 48)
_PAYLOAD_DIGEST: Final = slice(32, 48)
_HEAD_DIGEST: Final = slice(48, 64)
_BODY: Final = slice(64, HEADER_BYTES)  # words 8..31
_FIELDS: Final = struct.Struct("<8q16s112x")  # exactly the body: step ... payload bytes, digest of the run id, zeros
_SEALED: Final = 0xFFFF_FFFF  # lower half of the seal word: step + 1
_GENERATIONS: Final = 0x7FFF_FFFF  # wraps after 2**31 writes: two years at thirty steps a second
_PIECE: Final = 4 << 20  # hash and copy in pieces of this size, so that other threads get their turn
_READ_TRIES: Final = 3

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
    return _payload_offset(layout_bytes, own_bytes, payload_bytes) + payload_bytes


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
    where: str = "memory",
) -> Snapshot:
    """Read a snapshot out of any bytes and check all that can be checked.

    `run`, `rank`, `step`: what is expected, None = anything. `header`: stands in for the first 256 bytes of `memory`.
    `verify=False` skips the payload's digest. `hashed`: it is known already. `stamped=True` refuses a payload that nobody has hashed.
    Raises SnapshotMissing (no seal), SnapshotCorrupt, SnapshotMismatch (sound, but another one).
    """
    view = memoryview(memory).cast("B").toreadonly()
    if len(view) < HEADER_BYTES:
        raise SnapshotCorrupt(f"snapshot: {HEADER_BYTES} bytes of header expected, {len(view)} found ({where})")
    header = bytes(view[:HEADER_BYTES]) if header is None else header
    num_bytes = announced_bytes(header, where)
    words = memoryview(header).cast("q")
    found_step, found_rank, world_size, round_, layout_len, own_len, payload_at, _, found_run = _FIELDS.unpack(header[_BODY])
    subject = f"snapshot rank={found_rank} step={found_step}"
    if num_bytes > len(view):
        raise SnapshotCorrupt(f"{subject}: {num_bytes} bytes expected, {len(view)} found ({where})")
    head_end = HEADER_BYTES + layout_len + own_len
    head = bytes(view[HEADER_BYTES:head_end])
    if xxhash.xxh3_128_digest(header[_BODY] + head) != header[_HEAD_DIGEST] or any(view[head_end:payload_at]):
        raise SnapshotCorrupt(f"{subject}: header, layout or own state are not what was sealed ({where})")
    if words[_ECHO] != ~words[_SEAL] or (words[_SEAL] & _SEALED) - 1 != found_step:
        raise SnapshotCorrupt(f"{subject}: the seal {words[_SEAL]:#x} is not that of its header ({where})")
    if run is not None and xxhash.xxh3_128_digest(run.encode()) != found_run:
        raise SnapshotMismatch(f"{subject}: run {run!r} expected, another run's found ({where})")
    for name, wanted, there in (("rank", rank, found_rank), ("step", step, found_step)):
        if wanted is not None and wanted != there:
            raise SnapshotMismatch(f"{subject}: {name} {wanted} expected, {there} found ({where})")

    payload = view[payload_at:num_bytes]
    if not payload and any(header[_STAMP_ALL]):
        raise SnapshotCorrupt(f"{subject}: a stamp where there is no payload ({where})")
    is_stamped = words[_STAMP] == words[_SEAL] or not payload
    if stamped and not is_stamped:
        raise SnapshotCorrupt(f"{subject}: its payload was not hashed under this seal ({where})")
    if verify and is_stamped and payload and (hashed or _hash(payload)) != header[_PAYLOAD_DIGEST]:
        raise SnapshotCorrupt(f"{subject}: the payload is not what was hashed ({where})")
    return Snapshot(found_step, found_rank, world_size, round_, head[:layout_len], head[layout_len:], payload, num_bytes, is_stamped)


def layout_of(head: bytes) -> bytes:
    """The layout in a head (all before the payload) whose digest was checked."""
    return head[HEADER_BYTES : HEADER_BYTES + memoryview(head[:HEADER_BYTES]).cast("q")[_LAYOUT_BYTES]]


def own_of(head: bytes) -> bytes:
    """The own state in such a head."""
    words = memoryview(head[:HEADER_BYTES]).cast("q")
    begin = HEADER_BYTES + words[_LAYOUT_BYTES]
    return head[begin : begin + words[_OWN_BYTES]]


def stamped_digest(header: bytes) -> bytes:
    """The payload's digest, as a stamped header says."""
    return bytes(header[_PAYLOAD_DIGEST])


def announced_bytes(header: bytes, where: str = "header") -> int:
    """Length of the whole snapshot that begins with this header. Raises SnapshotMissing, SnapshotCorrupt; checks no digest."""
    if len(header) != HEADER_BYTES:
        raise SnapshotCorrupt(f"snapshot: {HEADER_BYTES} bytes of header expected, {len(header)} found ({where})")
    words = memoryview(header).cast("q")
    if words[_SEAL] & _SEALED == 0:
        raise SnapshotMissing(f"snapshot: not sealed, so there is none here ({where})")
    if words[0] != MAGIC:
        raise SnapshotCorrupt(f"snapshot: format mark {MAGIC:#x} expected, {words[0]:#x} found ({where})")
    layout, own, payload_at, payload = words[_LAYOUT_BYTES : _PAYLOAD_BYTES + 1]
    if min(layout, own, payload) < 0 or payload_at != _payload_offset(layout, own, payload):
        raise SnapshotCorrupt(f"snapshot: sizes {layout}, {own}, {payload_at}, {payload} cannot be ({where})")
    return payload_at + payload


class Slot:
    """A region of a segment file that holds one snapshot, mapped.

    The file exists and has its size already (checkpoint/memory.py makes it). A reader may come while another process
    writes: what it gets is whole, or refused.
    """

    def __init__(self, path: str, *, offset: int = 0, num_bytes: int | None = None, writable: bool = True, populate: bool = False) -> None:
        """Map `num_bytes` (None: the rest of the file) from `offset`: a multiple of 8, of 4096 where there is a payload.

        `populate`: map all pages now, so that the first write is as fast as the later ones (about 0.1 s per GB, once).
        Raises SnapshotMissing if there is no such file, SnapshotCorrupt if it is too short for the region.
        """
        self.where = f"{path}+{offset}" if offset else path
        self.path = path
        self._offset = offset
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SnapshotMissing(f"segment: no such file ({path})") from None
        self._fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)
        room = os.fstat(fd).st_size - offset
        self.num_bytes = room if num_bytes is None else num_bytes
        if offset % 8 or not HEADER_BYTES <= self.num_bytes <= room:
            self._close_fd()
            raise SnapshotCorrupt(f"segment: {max(self.num_bytes, HEADER_BYTES)} bytes from {offset} on expected, {room} found ({path})")
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE if populate else mmap.MAP_SHARED
        self._map = mmap.mmap(fd, offset + self.num_bytes - start, flags=flags, prot=protection, offset=start)
        self._memory = self.memory = memoryview(self._map)[offset - start :]  # public for who registers its pages with a driver
        self._words = self._memory[:HEADER_BYTES].cast("q")
        self._barrier = threading.Lock()  # taking and releasing it is a full barrier on every CPU that torch runs on
        self._received = b""

    def renamed(self, path: str) -> None:
        """The file has this name now; the mapping stays."""
        self.where = self.where.replace(self.path, path)
        self.path = path

    def close(self) -> None:
        """Unmap, once nobody holds a view any more. The file stays; its owner unlinks it."""
        self._close_fd()
        self._words.release()
        self._memory.release()
        with contextlib.suppress(BufferError):  # somebody still holds a payload: the mapping goes when that goes
            self._map.close()

    # ------------------------------------------------------------------ writing

    def begin(
        self,
        *,
        run: str,
        rank: int,
        world_size: int,
        round: int,
        layout: bytes,
        own: bytes,
        payload_bytes: int,
        after: int = 0,
    ) -> memoryview:
        """Break the seal, write all but the payload, give the payload's memory to be filled: (payload_bytes,) uint8.

        `after`: a generation this write must follow (see Ring). Raises SnapshotMismatch if it does not fit; what was there stays.
        """
        payload_at = _payload_offset(len(layout), len(own), payload_bytes)
        if payload_at + payload_bytes > self.num_bytes:
            raise SnapshotMismatch(
                f"snapshot rank={rank}: {payload_at + payload_bytes} bytes wanted ({len(layout)} layout, {len(own)} own, "
                f"{payload_bytes} payload), {self.num_bytes} there ({self.where})"
            )
        assert payload_bytes == 0 or self._offset % ALIGN == 0, "a slot with a payload begins at a multiple of 4096"
        hold.wait(self._fd, self._words[_PAYLOAD_BYTES])
        self.unseal(after)
        m, own_at = self._memory, HEADER_BYTES + len(layout)
        head_end = own_at + len(own)
        self._words[0] = MAGIC
        if not payload_bytes:
            m[_STAMP_ALL] = bytes(24)  # no stamp, ever: so that a flipped bit there is seen as well
        sizes = (len(layout), len(own), payload_at, payload_bytes)
        _FIELDS.pack_into(m, _BODY.start, NONE, rank, world_size, round, *sizes, xxhash.xxh3_128_digest(run.encode()))
        m[HEADER_BYTES:own_at] = layout
        m[own_at:head_end] = own
        m[head_end:payload_at] = bytes(payload_at - head_end)
        return m[payload_at : payload_at + payload_bytes]

    def seal(self, step: int) -> None:
        """The payload is complete: digest header, layout and own state, then store the seal."""
        m, w = self._memory, self._words
        assert w[_SEAL] & _SEALED == 0, f"seal({step}) without begin()"
        assert 0 <= step < _SEALED, f"seal({step}): a step is 0 or more"
        w[_STEP] = step
        head_end = HEADER_BYTES + w[_LAYOUT_BYTES] + w[_OWN_BYTES]
        m[_HEAD_DIGEST] = xxhash.xxh3_128_digest(m[_BODY.start : head_end])
        self._press(step)

    def unseal(self, after: int = 0) -> None:
        """Whatever is here no longer counts. The generation grows, so a reader in the middle of it notices."""
        self._words[_SEAL] = ((max(self.generation(), after) + 1) & _GENERATIONS) << 32
        with self._barrier:  # nothing of the next snapshot is stored before this
            pass

    def receive(self, header: bytes, after: int = 0) -> memoryview:
        """Break the seal for a snapshot that comes from elsewhere and give the memory behind its header to be filled.

        Raises SnapshotCorrupt if `header` is none, SnapshotMismatch if it does not fit; what was there then stays.
        """
        num_bytes = announced_bytes(header, self.where)
        if num_bytes > self.num_bytes:
            raise SnapshotMismatch(f"snapshot: {num_bytes} bytes announced, {self.num_bytes} there ({self.where})")
        self.unseal(after)
        self._received = header
        return self._memory[HEADER_BYTES:num_bytes]

    def accept(self, *, rank: int | None = None, step: int | None = None, hashed: bytes | None = None) -> int:
        """All of it has arrived: check every byte as `parse` does, then seal. Returns the step. If it raises, nothing is sealed."""
        header, self._received = self._received, b""
        found = parse(self._memory, header=header, rank=rank, step=step, stamped=True, hashed=hashed, where=self.where)
        w = self._words
        w[0] = MAGIC
        w[_STAMP] = (w[_SEAL] & ~_SEALED) | (found.step + 1) if found.payload else 0
        self._memory[_PAYLOAD_DIGEST.start : HEADER_BYTES] = header[_PAYLOAD_DIGEST.start :]
        self._press(found.step)
        return found.step

    def _press(self, step: int) -> None:
        seal = (self._words[_SEAL] & ~_SEALED) | (step + 1)
        self._words[_ECHO] = ~seal
        with self._barrier:  # all that was stored is there before the seal is
            pass
        self._words[_SEAL] = seal

    # ------------------------------------------------------------------ reading

    def sealed_step(self) -> int:
        """The step sealed here, NONE if none. One load."""
        return (self._words[_SEAL] & _SEALED) - 1

    def generation(self) -> int:
        """Counts the writes of this slot; the slots of a Ring are ordered by it."""
        return self._words[_SEAL] >> 32

    def sealed_bytes(self) -> int:
        """Header .. payload end of what is sealed; 0 if nothing is."""
        return self._words[_PAYLOAD_AT] + self._words[_PAYLOAD_BYTES] if self.sealed_step() != NONE else 0

    def read(
        self,
        *,
        run: str | None = None,
        rank: int | None = None,
        step: int | None = None,
        verify: bool = True,
        stamped: bool = False,
    ) -> Snapshot:
        """The snapshot sealed here, checked as `parse` does. `payload` stays a view of the slot: no copy."""
        for _ in range(_READ_TRIES):
            seal = self._words[_SEAL]
            try:
                found = parse(self._memory, run=run, rank=rank, step=step, verify=verify, stamped=stamped, where=self.where)
            except (SnapshotCorrupt, SnapshotMismatch):
                if self._words[_SEAL] == seal:
                    raise  # nobody wrote meanwhile: it is what it is
            else:
                if self._words[_SEAL] == seal:
                    return found
        raise SnapshotMissing(f"snapshot: overwritten {_READ_TRIES} times while it was being read ({self.where})")

    # ------------------------------------------------------------------ the agent's work

    def is_stamped(self) -> bool:
        """The payload's digest is there, or there is no payload to be hashed."""
        seal = self._words[_SEAL]
        return seal & _SEALED != 0 and (self._words[_PAYLOAD_BYTES] == 0 or self._words[_STAMP] == seal)

    def stamp_payload(self) -> bytes:
        """Hash the payload where it lies, store the digest with the seal it belongs to, return it.

        Raises SnapshotMissing if nothing is sealed or the seal moved meanwhile.
        """
        seal = self._words[_SEAL]
        payload = self.read(verify=False).payload
        digest = _hash(payload)
        self._stamp(seal, digest, payload)
        return digest

    def stage(self, into: memoryview) -> Snapshot:
        """Copy what is sealed into private memory, stamping both; the writer may overwrite the slot afterwards.

        Raises SnapshotMissing if the seal moved meanwhile, SnapshotCorrupt if the payload is not what was stamped before.
        """
        with self.held():
            generation, found = self.generation(), self.read(verify=False)
            if found.num_bytes > len(into):
                raise SnapshotMissing(f"snapshot step={found.step}: it has grown to {found.num_bytes} bytes meanwhile ({self.where})")
            self.fill(into[: found.num_bytes], 0)
            payload_at = found.num_bytes - len(found.payload)
            into[:payload_at] = self.stamped_head(generation, _hash(into[payload_at : found.num_bytes]))
        return parse(into[: found.num_bytes], verify=False, stamped=True, where=self.where)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Within this its writer waits a while before it overwrites what is sealed here (hold.py)."""
        return hold.held(self._fd, self._words[_PAYLOAD_BYTES])

    def fill(self, view: memoryview, offset: int) -> None:
        """Copy from here, `offset` bytes behind the header's begin. Nothing is checked: see `stamped_head`.

        From the file instead of the mapping: the kernel copies without the GIL, so the agent's event loop goes on.
        """
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + _PIECE]], self._offset + offset + done)
            if count == 0:
                raise SnapshotCorrupt(f"segment: {len(view)} bytes expected at {offset}, {done} found ({self.where})")
            done += count

    def stamped_head(self, generation: int, digest: bytes) -> bytes:
        """The payload that was read here since `generation` has this digest: stamp it, and give all before the payload, as it travels.

        Raises SnapshotMissing if it was overwritten meanwhile, SnapshotCorrupt if it is not what was stamped before.
        """
        seal = self._words[_SEAL]
        if seal >> 32 != generation or seal & _SEALED == 0:
            raise SnapshotMissing(f"snapshot: overwritten while it was being read ({self.where})")
        payload_at, payload_bytes = self._words[_PAYLOAD_AT], self._words[_PAYLOAD_BYTES]
        if payload_bytes and self.is_stamped() and bytes(self._memory[_PAYLOAD_DIGEST]) != digest:
            raise SnapshotCorrupt(f"snapshot step={self.sealed_step()}: the payload is not what was hashed ({self.where})")
        self._stamp(seal, digest, self._memory[payload_at : payload_at + payload_bytes])
        head = self.header() + bytes(self._memory[HEADER_BYTES:payload_at])
        self._check_unmoved(seal)
        return head

    def header(self) -> bytes:
        """The header as it travels: with generation zero, for that count is this memory's own affair."""
        header = bytearray(self._memory[:HEADER_BYTES])
        with memoryview(header).cast("q") as w:
            stamped = w[_STAMP] == w[_SEAL]
            w[_SEAL] &= _SEALED
            w[_ECHO] = ~w[_SEAL]
            w[_STAMP] = w[_SEAL] if stamped else 0
        return bytes(header)

    def body(self) -> memoryview:
        """The memory behind the header of what is sealed, read-only; who sends it compares `generation()` before and after."""
        return self._memory[HEADER_BYTES : self.sealed_bytes()].toreadonly()

    def _stamp(self, seal: int, digest: bytes, payload: memoryview) -> None:
        self._check_unmoved(seal)
        if payload:
            self._words[_STAMP] = 0
            self._memory[_PAYLOAD_DIGEST] = digest
            self._words[_STAMP] = seal  # belongs to that seal only: harmless if the writer has just moved on

    def _check_unmoved(self, seal: int) -> None:
        if self._words[_SEAL] != seal:
            raise SnapshotMissing(f"snapshot step={(seal & _SEALED) - 1}: overwritten while it was being read ({self.where})")


def _payload_offset(layout_bytes: int, own_bytes: int, payload_bytes: int) -> int:
    head_end = HEADER_BYTES + layout_bytes + own_bytes
    return -(-head_end // ALIGN) * ALIGN if payload_bytes else head_end


def _hash(payload: memoryview) -> bytes:
    digest = xxhash.xxh3_128()
    for start in range(0, len(payload), _PIECE):
        digest.update(payload[start : start + _PIECE])
    return digest.digest()
