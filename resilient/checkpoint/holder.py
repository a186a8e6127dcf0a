"""Holder: the vault's door for other nodes. Keeps copies for them, and gives out what this node's memory tier holds.

Think of the foreman at the ramp (peer.py has the picture): he clears the place, lets the carts in, and looks everything over before the
door is shut behind it.

Contract: see peer.py for what is said. Copies of ranks that sit on this node are refused: their workers write there. Nothing of ours
writes to a place after its berth has been left: a haul ends when the last of its connections has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from resilient.checkpoint.chest import Berth, MemoryTier
from resilient.checkpoint.haul import PIECE_BYTES, TCP, Incoming, Limit, Outgoing, Source, Work, payload_place
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.peer import HAULED_BYTES, checked, haul_s
from resilient.checkpoint.pipe import (
    ANSWER_S,
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
    Request,
)
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import SNAPSHOT_BYTES_MAX, announced_bytes, layout_at, stamped_digest
from resilient.checkpoint.tally import Tally
from resilient.checkpoint.tier import Kind, SnapshotKey
from resilient.checkpoint.transport import STALL_S, Transport
from resilient.errors import CheckpointError, ProtocolError, SnapshotCorrupt, SnapshotMissing, TierUnavailable
from resilient.wire.link import accept

RANKS_MAX: Final = 1 << 20
CONNECTIONS_MAX: Final = 256  # each peer has six; those are the owners of copies here, and one for each lost rank that is fetched
STREAMS_MAX: Final = 32
BROKEN_MAX: Final = 16  # transfers that broke off and may be gone on with, the last ones
LEAVES_MAX: Final = 256  # snapshots whose leaves are kept: 16 bytes for each 4 MiB and each small tensor
LEAVES_THREADS: Final = 2
OVERTAKEN_S: Final = 60.0  # as in resilient_agents/copies.py
IDLE_S: Final = 600.0  # a kept connection without a word; the other side simply connects anew
log = logging.getLogger(__name__)


class PeerServer:
    """Keeps copies for other nodes, and gives out what this node's memory tier holds."""

    def __init__(
        self,
        memory: MemoryTier,
        notes: Notes,
        *,
        token: str,
        run: str,
        limit: Limit | None = None,
        transport: Transport = TCP,
    ) -> None:
        """`memory`: copies go there, under the rank they are of; ranks whose chest is `seated` here take none.

        `limit`: of what is fetched here to be kept elsewhere.
        """
        self._memory = memory
        self._limit = limit
        self._transport = transport
        self._notes = notes
        self.changed: Callable[[], None] = lambda: None  # a copy has come
        self.heard: Callable[[Offer | Covered], None] = lambda _: None  # of parity
        self.sheet: Callable[[str], bytes] = _no_sheet  # that with this digest; raises SnapshotMissing
        self._token = token
        self._run = run
        self._server: asyncio.Server | None = None
        self._hauls: dict[bytes, _Haul] = {}
        self._broken: dict[tuple[int, Kind], _Broken] = {}  # what came of a rank's copy whose transfer broke off
        self._leaves: dict[str, tuple[bytes, bytes]] = {}  # slot -> (header, leaves) of its last snapshot of which they were asked for
        self._overtaken: dict[int, float] = {}  # rank whose writer was faster than the wire -> until when it is thought to be
        self._threads = ThreadPoolExecutor(CONNECTIONS_MAX, "peer")
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen at `host` ("" = every address of this machine); the port."""
        dual = not host and socket.has_dualstack_ipv6()  # one socket for both families: two would get two ports
        family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual)
        self._server = await asyncio.start_server(self._on_connection, sock=listener)
        return int(listener.getsockname()[1])

    async def close(self) -> None:
        """Stop listening, end what is under way."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        self._threads.shutdown(wait=False)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        pipe = None
        try:
            if len(self._tasks) > CONNECTIONS_MAX:
                raise ProtocolError(f"more than {CONNECTIONS_MAX} connections")
            pipe = Pipe(await accept(reader, writer, Request, token=self._token, run=self._run), Request)
            while True:
                await self._answer(pipe, await pipe.recv(IDLE_S))
        except (ProtocolError, OSError) as error:  # TimeoutError is an OSError
            log.warning("peer %s: connection closed: %s", pipe.name if pipe else "", str(error) or type(error).__name__)
        except EOFError:
            pass  # the other side is done
        except asyncio.CancelledError:
            pass  # close() was called; a task of a stream server that ends cancelled would be reported as an error
        finally:
            self._tasks.discard(task)
            if pipe is not None:
                pipe.close()
            writer.close()

    async def _answer(self, pipe: Pipe, request: Request) -> None:
        try:
            match request:
                case Put():
                    await self._take(pipe, request)
                case Get():
                    await self._give(pipe, request)
                case Carry():
                    await self._carry(pipe, request)
                case Hauled():
                    raise ProtocolError("the end of a haul that was not begun here")
                case Drop():
                    self._memory.drop(SnapshotKey(request.rank, request.step, request.kind))
                    await pipe.send(Done())
                case Catalogue():
                    keys = tuple((key.rank, key.step, key.kind) for key in self._memory.list())
                    await pipe.send(Listed(keys=keys))
                case Note():
                    self._notes.add(request.recorded)
                    await pipe.send(Done())
                case Offer() | Covered():
                    self.heard(request)
                    await pipe.send(Done())
                case Digests():
                    sheet = self.sheet(request.digest)
                    await pipe.send(Following(num_bytes=len(sheet)))
                    await pipe.send_bulk(memoryview(sheet))
                case Recollect():
                    for note in self._notes.of(request.rank):
                        await pipe.send(Note(recorded=note))
                    await pipe.send(Done())
        except CheckpointError as error:
            await pipe.send(Failed(error=type(error).__name__, text=str(error)))

    async def _take(self, pipe: Pipe, request: Put) -> None:
        key = SnapshotKey(request.rank, request.step, request.kind)
        num_bytes = announced_bytes(request.header, f"sent by {pipe.name}")
        if max(num_bytes, request.room) > SNAPSHOT_BYTES_MAX or not 0 <= key.rank < RANKS_MAX:
            raise ProtocolError(f"{key}: {max(num_bytes, request.room)} bytes announced, at most {SNAPSHOT_BYTES_MAX} taken")
        if self._memory.chest(key.rank).seated:
            raise TierUnavailable(f"{key}: that rank sits on this node, its worker writes here")
        broken = self._broken.pop((key.rank, key.kind), None)
        berth = broken.berth if broken is not None and broken.header == request.header else self._memory.berth(key)
        with berth:
            if not request.streams:
                view = await asyncio.to_thread(berth.receive, request.header, request.room)
                await pipe.send(Ready())
                await pipe.recv_bulk(view)
                await checked(berth, key, num_bytes, None)
            elif broken is not None and berth is broken.berth and berth.untouched():
                await checked(berth, key, num_bytes, await self._take_haul(pipe, request, broken))
            else:
                view = await asyncio.to_thread(berth.receive, request.header, request.room)
                fresh = _Broken(berth, request.header, Incoming(view, request.header, transport=self._transport))
                await checked(berth, key, num_bytes, await self._take_haul(pipe, request, fresh))
        self.changed()
        await pipe.send(Done())

    async def _take_haul(self, pipe: Pipe, request: Put, what: _Broken) -> bytes | None:
        """Bring in what is missing; the payload's digest, None where only looking at all of it will tell."""
        try:
            async with self._haul(pipe, what.incoming, request.streams) as haul:
                await pipe.send(Ready(haul=haul.name, have=what.incoming.have()))
                await haul.hauled(len(what.incoming.body))
        except BaseException:
            self._broken[request.rank, request.kind] = what
            for oldest in list(self._broken)[:-BROKEN_MAX]:
                del self._broken[oldest]
            raise
        if what.incoming.missing():
            raise ProtocolError("the haul has come to its end, and pieces are missing")
        return what.incoming.digest()

    async def _give(self, pipe: Pipe, request: Get) -> None:
        key = SnapshotKey(request.rank, request.step, request.kind)
        slot = self._memory.slot(key, request.world_size)
        if not slot.is_stamped():
            await asyncio.to_thread(slot.stamp_payload)
        source = Source.of(key, slot)
        if request.head:
            head = source.body[: payload_place(source.header)]
            await pipe.send(Found(header=source.header, num_bytes=len(head)))
            await pipe.send_bulk(head)
        elif request.leaves:
            _same(request, source)
            leaves = await asyncio.to_thread(self._leaves_of, source, slot)
            await pipe.send(Found(header=source.header, num_bytes=len(leaves)))
            await pipe.send_bulk(memoryview(leaves))
        elif request.parts:
            await self._give_parts(pipe, request, source, slot)
        elif request.streams and len(source.body) > HAULED_BYTES:
            have = request.have if request.header == source.header else ()
            work = Outgoing(source.body, have=have, unmoved=source.unmoved, transport=self._transport)
            async with self._haul(pipe, work, request.streams) as haul:
                await pipe.send(Found(header=source.header, haul=haul.name, room=slot.num_bytes))
                await haul.hauled(len(source.body))
        else:
            await pipe.send(Found(header=source.header))
            await pipe.send_bulk(source.body)
        if not source.unmoved():
            raise SnapshotMissing(f"{key}: overwritten while it was being sent")
        await pipe.send(Done())

    def _leaves_of(self, source: Source, slot: Slot) -> bytes:
        """Made once for each snapshot, however many nodes ask. Raises SnapshotCorrupt or SnapshotMissing if it is not what was hashed."""
        known = self._leaves.get(slot.where)
        if known is not None and known[0] == source.header:
            return known[1]
        at = payload_place(source.header)
        tally = Tally(layout_at(source.header, source.body), len(source.body) - at)
        tally.add_all(source.body[at:], threads=LEAVES_THREADS)
        if tally.digest() != stamped_digest(source.header):
            if not source.unmoved():
                raise SnapshotMissing(f"overwritten while its digests were made ({slot.where})")
            raise SnapshotCorrupt(f"the payload is not what was hashed ({slot.where})")
        leaves = tally.leaves()
        self._leaves[slot.where] = (source.header, leaves)
        for oldest in list(self._leaves)[:-LEAVES_MAX]:
            self._leaves.pop(oldest, None)
        return leaves

    async def _give_parts(self, pipe: Pipe, request: Get, source: Source, slot: Slot) -> None:
        """A writer that came back too soon is asked for patience for a while (hold.py): others' stripes of a parity wait for this one."""
        _same(request, source)
        for begin, end in request.parts:
            if not 0 <= begin < end <= min(begin + PIECE_BYTES, len(source.body)):
                raise ProtocolError(f"{begin} to {end} of a body of {len(source.body)} bytes asked for")
        work = Outgoing(
            source.body,
            parts=request.parts,
            have=request.have,
            limit=self._limit if request.limited else None,
            unmoved=source.unmoved,
            sums=request.sums,
            transport=self._transport,
        )
        patience = slot.held() if self._overtaken.get(request.rank, 0.0) > time.monotonic() else contextlib.nullcontext()
        try:
            with patience:
                async with self._haul(pipe, work, request.streams) as haul:
                    await pipe.send(Found(header=source.header, haul=haul.name))
                    await haul.hauled(sum(end - begin for begin, end in request.parts))
        finally:
            if not source.unmoved():
                self._overtaken[request.rank] = time.monotonic() + OVERTAKEN_S

    @contextlib.asynccontextmanager
    async def _haul(self, pipe: Pipe, work: Work, streams: int) -> AsyncIterator[_Haul]:
        """Within this, connections may join; afterwards none of them is at work any more."""
        if not 0 < streams <= STREAMS_MAX:
            raise ProtocolError(f"a haul over {streams} connections, at most {STREAMS_MAX} taken")
        haul = _Haul(pipe, work, streams)
        self._hauls[haul.name] = haul
        try:
            yield haul
        finally:
            del self._hauls[haul.name]
            await haul.stop()

    async def _carry(self, pipe: Pipe, request: Carry) -> None:
        haul = self._hauls.get(request.haul)
        if haul is None:
            raise ProtocolError("a connection for a haul that is over, or never was")
        if request.transport != self._transport.name:
            raise ProtocolError(f"transport {self._transport.name!r} expected, {request.transport!r} found (see --data-transport)")
        await haul.carry(pipe, self._threads)


class _Haul:
    """A haul at the server: the connections that are at work for it, each in its own task."""

    def __init__(self, control: Pipe, work: Work, streams: int) -> None:
        self.name = secrets.token_bytes(8)
        self._control = control
        self._work = work
        self._left = streams
        self._begun = asyncio.Event()
        self._all_ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def carry(self, pipe: Pipe, threads: Executor) -> None:
        """One connection's share."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._begun.set()
        try:
            await pipe.lend(self._work.carry, threads)
        except BaseException:
            self._control.shut()  # whoever waits for the haul's end need not wait for it
            raise
        finally:
            self._tasks.discard(task)
        self._left -= 1
        if self._left <= 0:
            self._all_ended.set()

    async def hauled(self, num_bytes: int) -> None:
        """Wait until the caller says that it is done, and for what is still in the sockets then. Raises as Pipe.recv."""
        async with asyncio.timeout(ANSWER_S):
            await self._begun.wait()
        if not isinstance(said := await self._control.recv(haul_s(num_bytes)), Hauled):
            raise ProtocolError(f"the end of a haul expected, {type(said).__name__} found")
        async with asyncio.timeout(STALL_S):
            await self._all_ended.wait()

    async def stop(self) -> None:
        """Whoever is still at it ends, and its connection with it."""
        self._work.stop()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)  # a thread whose socket was shut ends at once, and nothing may write here after this
        self._work.close()


@dataclass(frozen=True)
class _Broken:
    """A transfer that broke off: what has come lies where it belongs."""

    berth: Berth
    header: bytes
    incoming: Incoming


def _same(request: Get, source: Source) -> None:
    if request.header != source.header:
        raise SnapshotMissing(f"rank {request.rank} step {request.step}: another snapshot of that step lies here")


def _no_sheet(digest: str) -> bytes:
    raise SnapshotMissing(f"sheet {digest}: none is kept here")
