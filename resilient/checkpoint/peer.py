"""Peer: snapshots kept by another node, sent from one agent's vault to another's.

Think of two warehouses with a ramp between them: a slip of paper says what comes, the other side clears the place and says "ready", and
then the goods roll straight to their shelf; they count as delivered only when the foreman has looked them over.

    Put(key, header)  ->                      Get(key)  ->
                      <-  Ready | Failed                <-  Found(header) | Failed
    bytes             ->                                <-  bytes
                      <-  Done | Failed                 <-  Done | Failed

Contract: the connection is proven as wire/link.py does (run id and job token, both sides), then carries frames and bulk
(checkpoint/pipe.py), from shared memory to shared memory without a copy of ours. A received copy is sealed last, after every digest
was found right. Anything unexpected closes the connection with one log line. Nothing is encrypted: see docs/protocol.md.
Beside snapshots a peer keeps a rank's *notes*: results of its set-up collectives, which a newcomer on that node will ask for.
Numbers: hashing what came adds 0.12 s per GB to the transfer.
Rejected: parts of a snapshot (nothing could verify them); the sender hashing too (the receiver does, before it seals).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

from resilient.checkpoint.chest import MemoryTier
from resilient.checkpoint.pipe import (
    Answer,
    Catalogue,
    Done,
    Drop,
    Failed,
    Found,
    Get,
    Listed,
    Note,
    Pipe,
    Put,
    Ready,
    Recollect,
    Request,
    allowed_s,
)
from resilient.checkpoint.snapshot import HEADER_BYTES, Buffer, announced_bytes, parse
from resilient.checkpoint.tier import Landing, SnapshotKey, landing
from resilient.core.messages import Msg, Recorded
from resilient.errors import (
    CheckpointError,
    ProtocolError,
    SnapshotCorrupt,
    SnapshotMismatch,
    SnapshotMissing,
    TierUnavailable,
)
from resilient.wire.link import accept, connect

SNAPSHOT_BYTES_MAX: Final = 1 << 40  # whether there is room is seen when it is made; this only keeps nonsense out
RANKS_MAX: Final = 1 << 20
CONNECTIONS_MAX: Final = 64  # a node copies to one or two others, and serves one fetch per lost rank
IDLE_S: Final = 600.0  # a kept connection without a word; the other side simply connects anew
NOTES_BYTES_MAX: Final = 16 << 20  # per rank; a script that records more cannot be repeated by a newcomer anyway
_INLINE_BYTES: Final = 1 << 20  # checking less than this takes less time than handing it to a thread

T = TypeVar("T")
A = TypeVar("A", bound=Msg)
_ERRORS: Final[dict[str, type[CheckpointError]]] = {
    error.__name__: error for error in (SnapshotMissing, SnapshotCorrupt, SnapshotMismatch, TierUnavailable)
}
log = logging.getLogger(__name__)


class Notes:
    """Results of set-up collectives, by rank; of ranks seated here, and of others whose node sent them."""

    def __init__(self) -> None:
        """Empty."""
        self._kept: dict[int, dict[int, Recorded]] = {}
        self._num_bytes: dict[int, int] = {}
        self._restarts: dict[int, int] = {}  # rank -> the start of the group that its notes are of

    def add(self, note: Recorded) -> None:
        """Keep it; the first one of an index stays, until the whole group starts again (`restart` grows).

        Of a rank that has said too much, nothing more is kept.
        """
        newest = self._restarts.setdefault(note.rank, note.restart)
        if note.restart < newest:
            return
        if note.restart > newest:
            self._restarts[note.rank] = note.restart
            self._kept.pop(note.rank, None)
            self._num_bytes.pop(note.rank, None)
        kept = self._kept.setdefault(note.rank, {})
        grown = self._num_bytes.get(note.rank, 0) + len(note.payload) + len(note.key)
        if note.index not in kept and grown <= NOTES_BYTES_MAX:
            kept[note.index] = note
            self._num_bytes[note.rank] = grown

    def of(self, rank: int) -> tuple[Recorded, ...]:
        """All notes of a rank, in their order."""
        return tuple(note for _, note in sorted(self._kept.get(rank, {}).items()))


class PeerServer:
    """Keeps copies for other nodes, and gives out what this node's memory tier holds."""

    def __init__(self, memory: MemoryTier, notes: Notes, *, token: str, run: str) -> None:
        """`memory`: copies go there, under the rank they are of; ranks whose chest is `seated` here take none."""
        self._memory = memory
        self._notes = notes
        self.changed: Callable[[], None] = lambda: None  # a copy has come
        self._token = token
        self._run = run
        self._server: asyncio.Server | None = None
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
                case Drop():
                    self._memory.drop(SnapshotKey(request.rank, request.step, request.kind))
                    await pipe.send(Done())
                case Catalogue():
                    keys = tuple((key.rank, key.step, key.kind) for key in self._memory.list())
                    await pipe.send(Listed(keys=keys))
                case Note():
                    self._notes.add(request.recorded)
                    await pipe.send(Done())
                case Recollect():
                    for note in self._notes.of(request.rank):
                        await pipe.send(Note(recorded=note))
                    await pipe.send(Done())
        except CheckpointError as error:
            await pipe.send(Failed(error=type(error).__name__, text=str(error)))

    async def _take(self, pipe: Pipe, request: Put) -> None:
        key = SnapshotKey(request.rank, request.step, request.kind)
        num_bytes = announced_bytes(request.header, f"sent by {pipe.name}")
        if num_bytes > SNAPSHOT_BYTES_MAX or not 0 <= key.rank < RANKS_MAX:
            raise ProtocolError(f"{key}: {num_bytes} bytes announced, at most {SNAPSHOT_BYTES_MAX} taken")
        if self._memory.chest(key.rank).seated:
            raise TierUnavailable(f"{key}: that rank sits on this node, its worker writes here")
        with self._memory.berth(key) as berth:
            view = await asyncio.to_thread(berth.receive, request.header)
            await pipe.send(Ready())
            await pipe.recv_bulk(view)
            await _checked(berth, key, num_bytes)
        self.changed()
        await pipe.send(Done())

    async def _give(self, pipe: Pipe, request: Get) -> None:
        key = SnapshotKey(request.rank, request.step, request.kind)
        slot = self._memory.slot(key)
        if not slot.is_stamped():
            await asyncio.to_thread(slot.stamp_payload)
        generation, header, body = slot.generation(), slot.header(), slot.body()
        if announced_bytes(header) != HEADER_BYTES + len(body):
            raise SnapshotMissing(f"{key}: overwritten just now")
        await pipe.send(Found(header=header))
        await pipe.send_bulk(body)
        if slot.generation() != generation:
            raise SnapshotMissing(f"{key}: overwritten while it was being sent")
        await pipe.send(Done())


class Peer:
    """Another node's vault, as a client on the event loop sees it. One connection, kept; one request at a time."""

    def __init__(self, address: str, *, token: str, run: str, name: str) -> None:
        """`address`: host:port. `name`: who we are, for the other side's log."""
        self.address = address
        self._token = token
        self._run = run
        self._name = name
        self._pipe: Pipe | None = None
        self._turn = asyncio.Lock()

    async def put(self, key: SnapshotKey, sealed: Buffer) -> None:
        """Leave a copy there. Raises as `Tier.put`; the payload's digest is checked by the receiver, before it seals."""
        found = parse(sealed, rank=key.rank, step=key.step, verify=False, stamped=True, where=f"{key} to be sent")
        data = memoryview(sealed).cast("B")[: found.num_bytes]
        header = bytes(data[:HEADER_BYTES])
        request = Put(rank=key.rank, step=key.step, kind=key.kind, header=header)
        async with self._conversation() as pipe:
            await pipe.send(request)
            await _expect(pipe, Ready, len(data))
            await pipe.send_bulk(data[HEADER_BYTES:])
            await _expect(pipe, Done, len(data))

    async def get(self, key: SnapshotKey, into: Buffer | Landing) -> int:
        """Fetch a copy. Raises as `Tier.get`."""
        target = landing(into)
        async with self._conversation() as pipe:
            await pipe.send(Get(rank=key.rank, step=key.step, kind=key.kind))
            header = (await _expect(pipe, Found, 0)).header
            num_bytes = announced_bytes(header, f"sent by {self.address}")
            await pipe.recv_bulk(await asyncio.to_thread(target.receive, header))
            await _expect(pipe, Done, 0)
            await _checked(target, key, num_bytes)
        return num_bytes

    async def list(self) -> tuple[SnapshotKey, ...]:
        """What lies there, in order of rank and step."""
        async with self._conversation() as pipe:
            await pipe.send(Catalogue())
            return tuple(SnapshotKey(*key) for key in (await _expect(pipe, Listed, 0)).keys)

    async def drop(self, key: SnapshotKey) -> None:
        """Have a copy forgotten."""
        async with self._conversation() as pipe:
            await pipe.send(Drop(rank=key.rank, step=key.step, kind=key.kind))
            await _expect(pipe, Done, 0)

    async def leave_note(self, note: Recorded) -> None:
        """Have it kept there."""
        async with self._conversation() as pipe:
            await pipe.send(Note(recorded=note))
            await _expect(pipe, Done, 0)

    async def notes(self, rank: int) -> tuple[Recorded, ...]:
        """All notes kept there of a rank, in their order."""
        found: list[Recorded] = []
        async with self._conversation() as pipe:
            await pipe.send(Recollect(rank=rank))
            while isinstance(answer := await _expect(pipe, Msg, 0), Note):
                found.append(answer.recorded)
        return tuple(found)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    @contextlib.asynccontextmanager
    async def _conversation(self) -> AsyncIterator[Pipe]:
        """One request at a time. Whatever goes wrong within, the connection is closed: nobody knows what is still on it."""
        async with self._turn:
            try:
                if self._pipe is None or self._pipe.is_closed():
                    self.close()
                    host, _, port = self.address.rpartition(":")
                    link = await connect(host, int(port), Answer, token=self._token, run=self._run, name=self._name)
                    self._pipe = Pipe(link, Answer)
                yield self._pipe
            except (OSError, EOFError, ProtocolError, ValueError) as error:  # TimeoutError is an OSError; ValueError: the address
                self.close()
                raise TierUnavailable(f"peer {self.address}: {str(error) or type(error).__name__}") from error
            except BaseException:
                self.close()
                raise


class PeerTier:
    """A Peer as a tier, for threads other than that of the event loop."""

    name = "peer"

    def __init__(self, peer: Peer, loop: asyncio.AbstractEventLoop) -> None:
        """`loop`: where `peer` lives."""
        self.peer = peer
        self._loop = loop

    def put(self, key: SnapshotKey, sealed: Buffer) -> None:
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


async def _checked(target: Landing, key: SnapshotKey, num_bytes: int) -> None:
    """Check what has arrived and seal it; in a thread where that takes longer than the hand-over."""
    if num_bytes <= _INLINE_BYTES:
        target.accept(rank=key.rank, step=key.step)
    else:
        await asyncio.to_thread(target.accept, rank=key.rank, step=key.step)
