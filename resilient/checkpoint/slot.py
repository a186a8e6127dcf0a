"""Slot: a region of a segment file that holds one snapshot, mapped: written by a worker, read and stamped by its agent.

Think of a safe with one compartment and a seal on its door: one person puts things in, any number may look, and nobody can take a
half-filled compartment for a full one.

Contract: what a snapshot is, byte by byte, stands in snapshot.py. One writer at a time; any number of readers, in other processes too,
which check after reading that the seal has not moved.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import threading
import weakref
from typing import Final

import xxhash

from resilient.checkpoint import hold
from resilient.checkpoint.snapshot import (
    ALIGN,
    BODY,
    ECHO,
    FIELDS,
    HEAD_DIGEST,
    HEADER_BYTES,
    LAYOUT_BYTES,
    MAGIC,
    OWN_BYTES,
    PAYLOAD_AT,
    PAYLOAD_BYTES,
    PAYLOAD_DIGEST,
    SEAL,
    SEALED,
    STAMP,
    STAMP_ALL,
    STEP,
    WORLD_SIZE,
    Snapshot,
    announced_bytes,
    parse,
    payload_offset,
)
from resilient.checkpoint.tally import PIECE, Tally
from resilient.core.messages import NONE
from resilient.errors import SnapshotCorrupt, SnapshotMismatch, SnapshotMissing

_GENERATIONS: Final = 0x7FFF_FFFF  # wraps after 2**31 writes: two years at thirty steps a second
_READ_TRIES: Final = 3


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
        self._gaps: tuple[bytes, list[tuple[int, int]]] = (b"", [])  # of a layout: what lies behind its tensors

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

        `after`: a generation this write must follow (see Ring). Raises SnapshotMismatch if it does not fit, SnapshotCorrupt if the layout
        is not the payload's; what was there stays.
        """
        payload_at = payload_offset(len(layout), len(own), payload_bytes)
        if payload_at + payload_bytes > self.num_bytes:
            raise SnapshotMismatch(
                f"snapshot rank={rank}: {payload_at + payload_bytes} bytes wanted ({len(layout)} layout, {len(own)} own, "
                f"{payload_bytes} payload), {self.num_bytes} there ({self.where})"
            )
        assert payload_bytes == 0 or self._offset % ALIGN == 0, "a slot with a payload begins at a multiple of 4096"
        if payload_bytes and layout != self._gaps[0]:
            self._gaps = layout, Tally(layout, payload_bytes).gaps()
        hold.wait(self._fd, self._words[PAYLOAD_BYTES])
        self.unseal(after)
        m, own_at = self._memory, HEADER_BYTES + len(layout)
        head_end = own_at + len(own)
        self._words[0] = MAGIC
        if not payload_bytes:
            m[STAMP_ALL] = bytes(24)  # no stamp, ever: so that a flipped bit there is seen as well
        sizes = (len(layout), len(own), payload_at, payload_bytes)
        FIELDS.pack_into(m, BODY.start, NONE, rank, world_size, round, *sizes, xxhash.xxh3_128_digest(run.encode()))
        m[HEADER_BYTES:own_at] = layout
        m[own_at:head_end] = own
        m[head_end:payload_at] = bytes(payload_at - head_end)
        payload = m[payload_at : payload_at + payload_bytes]
        for begin, end in self._gaps[1] if payload_bytes else ():
            payload[begin:end] = bytes(end - begin)
        return payload

    def seal(self, step: int) -> None:
        """The payload is complete: digest header, layout and own state, then store the seal."""
        m, w = self._memory, self._words
        assert w[SEAL] & SEALED == 0, f"seal({step}) without begin()"
        assert 0 <= step < SEALED, f"seal({step}): a step is 0 or more"
        w[STEP] = step
        head_end = HEADER_BYTES + w[LAYOUT_BYTES] + w[OWN_BYTES]
        m[HEAD_DIGEST] = xxhash.xxh3_128_digest(m[BODY.start : head_end])
        self._press(step)

    def unseal(self, after: int = 0) -> None:
        """Whatever is here no longer counts. The generation grows, so a reader in the middle of it notices."""
        self._words[SEAL] = ((max(self.generation(), after) + 1) & _GENERATIONS) << 32
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
        w[STAMP] = (w[SEAL] & ~SEALED) | (found.step + 1) if found.payload else 0
        self._memory[PAYLOAD_DIGEST.start : HEADER_BYTES] = header[PAYLOAD_DIGEST.start :]
        self._press(found.step)
        return found.step

    def _press(self, step: int) -> None:
        seal = (self._words[SEAL] & ~SEALED) | (step + 1)
        self._words[ECHO] = ~seal
        with self._barrier:  # all that was stored is there before the seal is
            pass
        self._words[SEAL] = seal

    # ------------------------------------------------------------------ reading

    def sealed_step(self) -> int:
        """The step sealed here, NONE if none. One load."""
        return (self._words[SEAL] & SEALED) - 1

    def world_size(self) -> int:
        """Of the run that sealed what is here."""
        return self._words[WORLD_SIZE]

    def generation(self) -> int:
        """Counts the writes of this slot; the slots of a Ring are ordered by it."""
        return self._words[SEAL] >> 32

    def sealed_bytes(self) -> int:
        """Header .. payload end of what is sealed; 0 if nothing is."""
        return self._words[PAYLOAD_AT] + self._words[PAYLOAD_BYTES] if self.sealed_step() != NONE else 0

    def read(
        self,
        *,
        run: str | None = None,
        rank: int | None = None,
        step: int | None = None,
        verify: bool = True,
        stamped: bool = False,
        threads: int = 1,
    ) -> Snapshot:
        """The snapshot sealed here, checked as `parse` does. `payload` stays a view of the slot: no copy."""
        look = functools.partial(parse, run=run, rank=rank, step=step, verify=verify, stamped=stamped, threads=threads, where=self.where)
        for _ in range(_READ_TRIES):
            seal = self._words[SEAL]
            try:
                found = look(self._memory)
            except (SnapshotCorrupt, SnapshotMismatch):
                if self._words[SEAL] == seal:
                    raise  # nobody wrote meanwhile: it is what it is
            else:
                if self._words[SEAL] == seal:
                    return found
        raise SnapshotMissing(f"snapshot: overwritten {_READ_TRIES} times while it was being read ({self.where})")

    # ------------------------------------------------------------------ the agent's work

    def is_stamped(self) -> bool:
        """The payload's digest is there, or there is no payload to be hashed."""
        seal = self._words[SEAL]
        return seal & SEALED != 0 and (self._words[PAYLOAD_BYTES] == 0 or self._words[STAMP] == seal)

    def stamp_payload(self) -> bytes:
        """Hash the payload where it lies, store the digest with the seal it belongs to, return it. Raises as `hashed`."""
        found, tally = self.hashed()
        return tally.digest() if found.payload else b""

    def hashed(self) -> tuple[Snapshot, Tally]:
        """As `stamp_payload`; gives what is sealed here, and the digests of its tensors.

        Raises SnapshotMissing if nothing is sealed or the seal moved meanwhile, SnapshotCorrupt if the layout is not the payload's, or the
        payload is not what was stamped before.
        """
        seal = self._words[SEAL]
        found = self.read(verify=False)
        tally = Tally(found.layout if found.payload else b"", len(found.payload))
        tally.add_all(found.payload)
        self._check_unmoved(seal)
        if found.payload and found.stamped and bytes(self._memory[PAYLOAD_DIGEST]) != tally.digest():
            raise SnapshotCorrupt(f"snapshot step={found.step}: the payload is not what was hashed ({self.where})")
        self._stamp(seal, tally.digest() if found.payload else b"", found.payload)
        return found, tally

    def stage(self, into: memoryview) -> Snapshot:
        """Copy what is sealed into private memory, stamping both; the writer may overwrite the slot afterwards.

        Raises SnapshotMissing if the seal moved meanwhile, SnapshotCorrupt if the payload is not what was stamped before.
        """
        with self.held():
            generation, found = self.generation(), self.read(verify=False)
            if found.num_bytes > len(into):
                raise SnapshotMissing(f"snapshot step={found.step}: it has grown to {found.num_bytes} bytes meanwhile ({self.where})")
            payload_at = found.num_bytes - len(found.payload)
            tally = Tally(found.layout if found.payload else b"", len(found.payload))
            for part in tally.parts:
                copy = into[payload_at + part.begin : payload_at + part.end]
                self.fill(copy, payload_at + part.begin)
                tally.add(part, copy)  # as long as it is in the cache
            into[:payload_at] = self.stamped_head(generation, tally.digest())
        return parse(into[: found.num_bytes], verify=False, stamped=True, where=self.where)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Within this its writer waits a while before it overwrites what is sealed here (hold.py)."""
        return hold.held(self._fd, self._words[PAYLOAD_BYTES])

    def marked(self) -> contextlib.AbstractContextManager[None]:
        """Within this its writer knows that somebody reads here; it decides itself what to make of that (hold.py)."""
        return hold.marked(self._fd)

    def is_marked(self) -> bool:
        """Whether another process has marked it."""
        return hold.is_marked(self._fd)

    def fill(self, view: memoryview, offset: int) -> None:
        """Copy from here, `offset` bytes behind the header's begin. Nothing is checked: see `stamped_head`.

        From the file instead of the mapping: the kernel copies without the GIL, so the agent's event loop goes on.
        """
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + PIECE]], self._offset + offset + done)
            if count == 0:
                raise SnapshotCorrupt(f"segment: {len(view)} bytes expected at {offset}, {done} found ({self.where})")
            done += count

    def stamped_head(self, generation: int, digest: bytes) -> bytes:
        """The payload that was read here since `generation` has this digest: stamp it, and give all before the payload, as it travels.

        Raises SnapshotMissing if it was overwritten meanwhile, SnapshotCorrupt if it is not what was stamped before.
        """
        seal = self._words[SEAL]
        if seal >> 32 != generation or seal & SEALED == 0:
            raise SnapshotMissing(f"snapshot: overwritten while it was being read ({self.where})")
        payload_at, payload_bytes = self._words[PAYLOAD_AT], self._words[PAYLOAD_BYTES]
        if payload_bytes and self.is_stamped() and bytes(self._memory[PAYLOAD_DIGEST]) != digest:
            raise SnapshotCorrupt(f"snapshot step={self.sealed_step()}: the payload is not what was hashed ({self.where})")
        self._stamp(seal, digest, self._memory[payload_at : payload_at + payload_bytes])
        head = self.header() + bytes(self._memory[HEADER_BYTES:payload_at])
        self._check_unmoved(seal)
        return head

    def header(self) -> bytes:
        """The header as it travels: with generation zero, for that count is this memory's own affair."""
        header = bytearray(self._memory[:HEADER_BYTES])
        with memoryview(header).cast("q") as w:
            stamped = w[STAMP] == w[SEAL]
            w[SEAL] &= SEALED
            w[ECHO] = ~w[SEAL]
            w[STAMP] = w[SEAL] if stamped else 0
        return bytes(header)

    def body(self) -> memoryview:
        """The memory behind the header of what is sealed, read-only; who sends it compares `generation()` before and after."""
        return self._memory[HEADER_BYTES : self.sealed_bytes()].toreadonly()

    def _stamp(self, seal: int, digest: bytes, payload: memoryview) -> None:
        self._check_unmoved(seal)
        if payload:
            self._words[STAMP] = 0
            self._memory[PAYLOAD_DIGEST] = digest
            self._words[STAMP] = seal  # belongs to that seal only: harmless if the writer has just moved on

    def _check_unmoved(self, seal: int) -> None:
        if self._words[SEAL] != seal:
            raise SnapshotMissing(f"snapshot step={(seal & SEALED) - 1}: overwritten while it was being read ({self.where})")
