"""Peer: snapshots kept by another node, sent from one agent's vault to another's.

Think of two warehouses with a ramp between them: a slip of paper says what comes, the other side clears the place and says "ready", and
then the goods roll straight to their shelf; they count as delivered only when the foreman has looked them over.

    Put(key, header)  ->                      Get(key)  ->
                      <-  Ready | Failed                <-  Found(header) | Failed
    bytes             ->                                <-  bytes
                      <-  Done | Failed                 <-  Done | Failed

Contract: the connection is proven as wire/link.py does (run id and job token, both sides), then carries frames and bulk
(checkpoint/pipe.py), from shared memory to shared memory without a copy of ours. More than HAULED_BYTES go over several connections of
their own (checkpoint/haul.py), so that own state passes them by:

    control   Put(streams=K) ->   <- Ready(haul, have)                                        Hauled ->   <- Done | Failed
    K others                         Carry(haul) ->   number, piece, number, piece, ... END ->

(of a Get the pieces go the other way). A received copy is sealed last, after every digest was found right. When a transfer breaks off, the
pieces that came stay where they are, and the next transfer of the same snapshot, which is one with the same header, brings only the
others; its payload's digest is checked as a whole all the same. Anything unexpected closes the connection with one log line. Nothing is
encrypted: see docs/protocol.md. Beside snapshots a peer keeps a rank's notes (checkpoint/notes.py). `pull` fetches parts of a body, for
parity (checkpoint/parity.py) each with its digest, for a world of another size (checkpoint/afar.py) by the digests that `leaves` gives;
vaults `say` when parity can be laid, and has been.
Rejected: the sender hashing whole snapshots too (the receiver does, before it seals).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import msgspec

from resilient.checkpoint import replicas
from resilient.checkpoint.chest import Berth
from resilient.checkpoint.handed import Handed
from resilient.checkpoint.haul import RATE_MIN, TCP, Incoming, Limit, Outgoing, Source, Span, Work, payload_place
from resilient.checkpoint.pipe import (
    ANSWER_S,
    Caller,
    Carry,
    Catalogue,
    Covered,
    Digests,
    Done,
    Drop,
    Failed,
    Following,
    Found,
    Get,
    Hauled,
    Listed,
    Note,
    Offer,
    Pipe,
    Put,
    Ready,
    Recollect,
    allowed_s,
)
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import Buffer, announced_bytes
from resilient.checkpoint.tier import Landing, SnapshotKey, landing
from resilient.checkpoint.transport import Transport
from resilient.core.messages import Msg, Recorded
from resilient.errors import (
    CheckpointError,
    ProtocolError,
    SnapshotCorrupt,
    SnapshotMismatch,
    SnapshotMissing,
    TierUnavailable,
)

STREAMS: Final = 4  # connections of one haul; on one wire two are enough, several wires (bonded, or many hops) need more
SHEET_BYTES_MAX: Final = 64 << 20  # a hundred bytes for each tensor
HEAD_BYTES_MAX: Final = 1 << 30  # layout and own state
HAULED_BYTES: Final = 1 << 20  # fewer are on their way sooner than the other connections are told

T = TypeVar("T")
A = TypeVar("A", bound=Msg)
_ERRORS: Final[dict[str, type[CheckpointError]]] = {
    error.__name__: error for error in (SnapshotMissing, SnapshotCorrupt, SnapshotMismatch, TierUnavailable)
}


class Peer:
    """Another node's vault, as a client on the event loop sees it. One request at a time, and beside it one haul."""

    def __init__(
        self,
        address: str,
        *,
        token: str,
        run: str,
        name: str,
        streams: int = STREAMS,
        limit: Limit | None = None,
        transport: Transport = TCP,
    ) -> None:
        """`address`: host:port. `name`: who we are, for the other side's log. `streams`: of a haul. `limit`: of what is put there."""
        self.address = address
        self._transport = transport
        self._limit = limit
        self._talk, self._haul, *self._streams = (Caller(address, token=token, run=run, name=name) for _ in range(2 + streams))
        self._threads = ThreadPoolExecutor(streams, "peer")
        self._broken: tuple[Landing, bytes, Incoming] | None = None  # a `get` that broke off

    async def put(self, key: SnapshotKey, sealed: Buffer | Slot, *, room: int = 0) -> None:
        """Leave a copy there. Raises as `Tier.put`; the payload's digest is checked by the receiver, before it seals.

        room: what may be wanted for later ones of its kind, so that their place need not be made anew.

        A Slot is sent from where it lies: SnapshotMissing if it is overwritten before all of it has gone.
        """
        source = Source.of(key, sealed)
        num_bytes = len(source.body)
        request = Put(rank=key.rank, step=key.step, kind=key.kind, header=source.header, room=room)
        try:
            if num_bytes > HAULED_BYTES:
                await self._put_haul(request, source)
                return
            if self._limit is not None:
                self._limit.take(num_bytes)  # goes at once: what waits for it is more than what it takes from others
            async with self._talk.conversation() as pipe:
                await pipe.send(request)
                await _expect(pipe, Ready, num_bytes)
                await pipe.send_bulk(source.body)
                await _expect(pipe, Done, num_bytes)
        except CheckpointError as error:
            if not source.unmoved():
                raise SnapshotMissing(f"{key}: overwritten while it was being sent") from error
            raise

    async def _put_haul(self, request: Put, source: Source) -> None:
        num_bytes = len(source.body)
        async with self._haul.conversation() as pipe:
            await pipe.send(msgspec.structs.replace(request, streams=len(self._streams)))
            ready = await _expect(pipe, Ready, num_bytes)
            work = Outgoing(source.body, have=ready.have, limit=self._limit, unmoved=source.unmoved, transport=self._transport)
            await self._carry(pipe, ready.haul, work, num_bytes)
            await _expect(pipe, Done, num_bytes)

    async def get(self, key: SnapshotKey, into: Buffer | Landing) -> int:
        """Fetch a copy. Raises as `Tier.get`. Into a Berth, after an error, another one goes on where this one broke off."""
        target = landing(into)
        hauls = key.kind == "snapshot"  # own state is not worth it
        request = Get(rank=key.rank, step=key.step, kind=key.kind, streams=len(self._streams) if hauls else 0)
        broken, self._broken = self._broken, None
        if broken is not None and (broken[0] is not target or not isinstance(target, Berth) or not target.untouched()):
            broken = None
        if broken is not None:
            request = msgspec.structs.replace(request, header=broken[1], have=broken[2].have())
        async with (self._haul if hauls else self._talk).conversation() as pipe:
            await pipe.send(request)
            found = await _expect(pipe, Found, 0)
            num_bytes = announced_bytes(found.header, f"sent by {self.address}")
            if broken is not None and found.header == broken[1]:
                incoming = broken[2]
            else:
                more = (found.room,) if isinstance(target, Berth) else ()
                body = await asyncio.to_thread(target.receive, found.header, *more)
                incoming = Incoming(body, found.header, transport=self._transport)
            if found.haul:
                try:
                    await self._carry(pipe, found.haul, incoming, num_bytes)
                except BaseException:
                    self._broken = (target, found.header, incoming)
                    raise
            else:
                await pipe.recv_bulk(incoming.body)
            await _expect(pipe, Done, 0)
            await checked(target, key, num_bytes, incoming.digest() if found.haul else None)
        return num_bytes

    async def head(self, key: SnapshotKey, *, world_size: int = 0) -> tuple[bytes, bytes]:
        """(header, what follows up to the payload) of what lies there. Of their content nothing has been checked.

        `world_size`: of the world that sealed it, 0 = of any.
        """
        async with self._talk.conversation() as pipe:
            await pipe.send(Get(rank=key.rank, step=key.step, kind=key.kind, world_size=world_size, head=True))
            found = await _expect(pipe, Found, 0)
            announced_bytes(found.header, f"sent by {self.address}")
            return found.header, await _following(pipe, found, min(payload_place(found.header), HEAD_BYTES_MAX))

    async def leaves(self, key: SnapshotKey, header: bytes, num_bytes: int, *, world_size: int = 0) -> bytes:
        """So many bytes: the leaves (tally.py) of the snapshot with this header. SnapshotMissing if it is another one."""
        async with self._talk.conversation() as pipe:
            await pipe.send(Get(rank=key.rank, step=key.step, kind=key.kind, header=header, world_size=world_size, leaves=True))
            return await _following(pipe, await _expect(pipe, Found, announced_bytes(header)), num_bytes)

    async def pull(
        self, key: SnapshotKey, header: bytes, parts: Sequence[Span], into: Handed, *, world_size: int = 0, limited: bool = False
    ) -> None:
        """These pieces of a snapshot's body to `into`, which goes on where it broke off. SnapshotMissing if it is another one."""
        request = Get(
            rank=key.rank,
            step=key.step,
            kind=key.kind,
            streams=len(self._streams),
            header=header,
            have=into.have(),
            world_size=world_size,
            parts=tuple(parts),
            sums=into.sums,
            limited=limited,
        )
        async with self._haul.conversation() as pipe:
            await pipe.send(request)
            found = await _expect(pipe, Found, 0)
            await self._carry(pipe, found.haul, into, sum(end - begin for begin, end in parts))
            await _expect(pipe, Done, 0)

    async def say(self, word: Offer | Covered) -> None:
        """Something that the other side only has to hear."""
        async with self._talk.conversation() as pipe:
            await pipe.send(word)
            await _expect(pipe, Done, 0)

    async def sheet(self, digest: str) -> bytes:
        """What of a snapshot it takes to compare replicas (replicas.py). Raises SnapshotMissing, SnapshotCorrupt if it is another one."""
        async with self._talk.conversation() as pipe:
            await pipe.send(Digests(digest=digest))
            num_bytes = (await _expect(pipe, Following, 0)).num_bytes
            if not 0 <= num_bytes <= SHEET_BYTES_MAX:
                raise ProtocolError(f"sheet: at most {SHEET_BYTES_MAX} bytes expected, {num_bytes} announced")
            found = bytearray(num_bytes)
            await pipe.recv_bulk(memoryview(found))
        if replicas.digest_of(found) != digest:
            raise SnapshotCorrupt(f"sheet: {digest} expected, {replicas.digest_of(found)} found (sent by {self.address})")
        return bytes(found)

    async def _carry(self, pipe: Pipe, name: bytes, work: Work, num_bytes: int) -> None:
        """All connections at work, until the last one has come to its end. When this returns or raises, none of them is."""

        async def one(stream: Caller) -> None:
            try:
                async with stream.conversation() as lent:
                    await lent.send(Carry(haul=name, transport=self._transport.name))
                    await lent.lend(work.carry, self._threads)
            except BaseException:
                work.stop()
                raise

        try:
            async with asyncio.timeout(haul_s(num_bytes)), asyncio.TaskGroup() as group:
                for stream in self._streams:
                    group.create_task(one(stream))
        except BaseException as error:
            for stream in self._streams:  # also those that had come to their end: nobody knows what of it has arrived
                stream.close()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        finally:
            work.close()
        await pipe.send(Hauled())

    async def list(self) -> tuple[SnapshotKey, ...]:
        """What lies there, in order of rank and step."""
        async with self._talk.conversation() as pipe:
            await pipe.send(Catalogue())
            return tuple(SnapshotKey(*key) for key in (await _expect(pipe, Listed, 0)).keys)

    async def drop(self, key: SnapshotKey) -> None:
        """Have a copy forgotten."""
        async with self._talk.conversation() as pipe:
            await pipe.send(Drop(rank=key.rank, step=key.step, kind=key.kind))
            await _expect(pipe, Done, 0)

    async def leave_note(self, note: Recorded) -> None:
        """Have it kept there."""
        async with self._talk.conversation() as pipe:
            await pipe.send(Note(recorded=note))
            await _expect(pipe, Done, 0)

    async def notes(self, rank: int) -> tuple[Recorded, ...]:
        """All notes kept there of a rank, in their order."""
        found: list[Recorded] = []
        async with self._talk.conversation() as pipe:
            await pipe.send(Recollect(rank=rank))
            while isinstance(answer := await _expect(pipe, Msg, 0), Note):
                found.append(answer.recorded)
        return tuple(found)

    def close(self) -> None:
        """Close the connections; the next request opens others."""
        for caller in (self._talk, self._haul, *self._streams):
            caller.close()


class PeerTier:
    """A Peer as a tier, for threads other than that of the event loop."""

    name = "peer"

    def __init__(self, peer: Peer, loop: asyncio.AbstractEventLoop) -> None:
        """`loop`: where `peer` lives."""
        self.peer = peer
        self._loop = loop

    def put(self, key: SnapshotKey, sealed: Buffer | Slot) -> None:
        """As `Tier.put`."""
        self._run(self.peer.put(key, sealed))

    def get(self, key: SnapshotKey, into: Buffer | Landing) -> int:
        """As `Tier.get`."""
        return self._run(self.peer.get(key, into))

    def list(self) -> Iterator[SnapshotKey]:
        """As `Tier.list`."""
        return iter(self._run(self.peer.list()))

    def drop(self, key: SnapshotKey) -> None:
        """As `Tier.drop`."""
        self._run(self.peer.drop(key))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        # no deadline here: every wait inside `work` has its own, and the loop that serves them outlives this thread
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _expect(pipe: Pipe, kind: type[A], num_bytes: int) -> A:
    """The answer to a request whose work grows with `num_bytes`. Raises what the other side says it failed with."""
    answer = await pipe.recv(allowed_s(num_bytes))
    if isinstance(answer, Failed):
        raise _ERRORS.get(answer.error, TierUnavailable)(f"{answer.text} [at {pipe.name}]")
    if not isinstance(answer, kind):
        raise ProtocolError(f"{kind.__name__} expected, {type(answer).__name__} found")
    return answer


async def _following(pipe: Pipe, found: Found, num_bytes: int) -> bytes:
    """The bytes behind the frame: exactly so many, or ProtocolError before any is taken."""
    if found.num_bytes != num_bytes:
        raise ProtocolError(f"{num_bytes} bytes expected, {found.num_bytes} announced")
    data = bytearray(num_bytes)
    await pipe.recv_bulk(memoryview(data))
    await _expect(pipe, Done, 0)
    return bytes(data)


async def checked(target: Landing, key: SnapshotKey, num_bytes: int, hashed: bytes | None) -> None:
    """Check what has arrived and seal it; in a thread where that takes longer than the hand-over."""
    if num_bytes <= HAULED_BYTES or hashed:
        target.accept(rank=key.rank, step=key.step, hashed=hashed)
    else:
        await asyncio.to_thread(target.accept, rank=key.rank, step=key.step)


def haul_s(num_bytes: int) -> float:
    """How long a haul may take at the lowest rate that can be set; one without a byte ends much sooner."""
    return ANSWER_S + num_bytes / RATE_MIN
