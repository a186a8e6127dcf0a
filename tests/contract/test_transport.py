"""What every transport must do. A third party's subclasses `TransportContract` and gives `transport`."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time

import pytest

from resilient.checkpoint import transport as module
from resilient.checkpoint.haul import PIECE_BYTES, Incoming, Limit, Outgoing
from resilient.checkpoint.memory import create
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import HEADER_BYTES, stamped_digest
from resilient.checkpoint.tcp import Plain, Tcp, TcpReceiver, TcpSender, prepare
from resilient.errors import ConfigError, ProtocolError, ResilientError

TAG = struct.Struct(">QH")  # any length will do
DATA = random.Random(1).randbytes(3 * PIECE_BYTES + 4321)


def sealed(path: str) -> tuple[bytes, bytes]:
    """A snapshot as it travels: header, body."""
    slot = Slot(create(path, 2 * len(DATA)))
    slot.begin(run="run", rank=0, world_size=1, round=1, layout=b"", own=b"own", payload_bytes=len(DATA))[:] = DATA
    slot.seal(1)
    spare = memoryview(bytearray(slot.num_bytes))
    found = bytes(spare[: slot.stage(spare).num_bytes])
    slot.close()
    return found[:HEADER_BYTES], found[HEADER_BYTES:]


class Both:
    """The two ends of one connection, each with its memory."""

    def __init__(self, way) -> None:
        self.roads = []
        for one in self.pair():
            one.settimeout(0)  # as the event loop leaves it
            self.roads.append(one)
        self.near, self.far = memoryview(bytearray(DATA)), memoryview(bytearray(len(DATA)))
        self.regions = [way.register(self.near), way.register(self.far)]
        self.sender, self.receiver = way.sender(self.roads[0], self.regions[0]), way.receiver(self.roads[1], self.regions[1])

    def pair(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            return near, listener.accept()[0]

    def place(self, tag: bytes) -> memoryview:
        begin, count = TAG.unpack(tag)
        return self.far[begin : begin + count]

    def take(self) -> bytes:
        return self.receiver.receive(TAG.size, self.place)

    def close(self) -> None:
        for region in self.regions:
            region.close()
        for road in self.roads:
            road.close()


@contextlib.contextmanager
def beside(work):
    """`work` in a thread; what it raises ends up in the list."""
    raised = []

    def run():
        try:
            work()
        except (OSError, EOFError, AssertionError, ResilientError) as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield raised
    thread.join(20)
    assert not thread.is_alive()


class TransportContract:
    """The suite."""

    @pytest.fixture
    def transport(self):
        raise NotImplementedError

    @pytest.fixture
    def ends(self, transport):
        found = Both(transport)
        yield found
        found.close()

    def test_pieces_come_to_their_places_under_their_tags(self, ends):
        sent = [(begin, random.Random(begin).randrange(1, 60_000)) for begin in (3 * PIECE_BYTES, 0, 777, PIECE_BYTES - 5)]
        sent = [(begin, min(count, len(DATA) - begin)) for begin, count in sent]

        def send():
            for begin, count in sent:
                ends.sender.send(TAG.pack(begin, count), begin, begin + count)
            ends.sender.finish(TAG.pack(0, 0))

        with beside(send) as raised:
            for begin, count in sent:
                assert ends.take() == TAG.pack(begin, count)
                assert ends.far[begin : begin + count] == DATA[begin : begin + count]
            assert ends.take() == TAG.pack(0, 0)
        assert not raised
        assert not any(ends.far[at] for at in range(0, len(DATA), 997) if not any(b <= at < b + c for b, c in sent))

    def test_afterwards_the_connection_is_its_owners_again(self, ends):
        with beside(lambda: ends.sender.finish(TAG.pack(0, 0))):
            assert ends.take() == TAG.pack(0, 0)
        for one, other in (ends.roads, ends.roads[::-1]):
            one.sendall(b"a word")
            assert other.recv(100) == b"a word"

    def test_several_connections_share_one_haul(self, transport, tmp_path):
        pairs = [socket.socketpair() for _ in range(3)]
        header, data = sealed(str(tmp_path / "slot"))
        body = memoryview(bytearray(len(data)))
        outgoing, incoming = Outgoing(memoryview(data), transport=transport), Incoming(body, header, transport=transport)
        with contextlib.ExitStack() as stack:
            raised = [stack.enter_context(beside(lambda road=near: outgoing.carry(road))) for near, _ in pairs]
            raised += [stack.enter_context(beside(lambda road=far: incoming.carry(road))) for _, far in pairs]
        assert not any(raised)
        assert body == data
        assert incoming.digest() == stamped_digest(header)
        outgoing.close()
        incoming.close()
        for road in (road for pair in pairs for road in pair):
            road.close()

    def test_what_is_sent_again_is_what_lies_there_now(self, ends):
        for round_ in (1, 2, 3):
            ends.near[:5] = bytes([round_]) * 5
            with beside(lambda: (ends.sender.send(TAG.pack(0, 5), 0, 5), ends.sender.finish(TAG.pack(0, 0)))) as raised:
                assert (ends.take(), ends.take()) == (TAG.pack(0, 5), TAG.pack(0, 0))
            assert not raised
            assert ends.far[:5] == bytes([round_]) * 5

    def test_the_pace_is_asked_before_every_byte(self, ends):
        paced = []
        with beside(lambda: ends.sender.send(TAG.pack(9, 0xFFFF), 9, 9 + 0xFFFF, paced.append)):
            ends.take()
        assert sum(paced) == 0xFFFF

        def never(num_bytes: int) -> None:
            raise ConnectionAbortedError(f"{num_bytes} too many")

        with pytest.raises(ConnectionAbortedError):
            ends.sender.send(TAG.pack(100_000, 5), 100_000, 100_005, never)
        assert not any(ends.far[100_000:100_005])

    def test_a_limit_holds(self, transport, tmp_path):
        pair = socket.socketpair()
        header, data = sealed(str(tmp_path / "slot"))
        body = memoryview(bytearray(len(data)))
        outgoing = Outgoing(memoryview(data), limit=Limit(4 * len(data)), transport=transport)
        incoming = Incoming(body, header, transport=transport)
        begin = time.monotonic()
        with beside(lambda: outgoing.carry(pair[0])) as raised:
            incoming.carry(pair[1])
        assert not raised
        assert body == data
        assert time.monotonic() - begin > 0.15  # a quarter of a second, less what a limited sender may catch up with
        for road in pair:
            road.close()

    def test_what_the_place_says_is_said(self, ends):
        def nowhere(tag: bytes) -> memoryview:
            raise ProtocolError(f"no place for {tag!r}")

        with beside(lambda: ends.sender.send(TAG.pack(0, 5), 0, 5)), pytest.raises(ProtocolError, match="no place"):
            ends.receiver.receive(TAG.size, nowhere)
        assert not any(ends.far[:5])

    def test_an_end_without_a_last_tag_is_an_error(self, ends):
        with beside(ends.take) as raised:
            ends.roads[0].close()
        assert isinstance(raised[0], (EOFError, OSError))

    def test_a_wait_in_which_nothing_moves_ends(self, transport, monkeypatch):
        monkeypatch.setattr(module, "STALL_S", 0.3)
        ends = Both(transport)
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match="no byte moved"):
            ends.take()
        with pytest.raises(TimeoutError, match="no byte moved"):
            for _ in range(20):  # until every buffer on the way is full
                ends.sender.send(TAG.pack(0, 0xFFFF), 0, len(DATA))
            ends.sender.finish(TAG.pack(0, 0))
        assert time.monotonic() - begin < 10
        ends.close()

    def test_whoever_gives_up_ends_it(self, ends):
        with beside(ends.take) as raised:
            time.sleep(0.05)  # either order is right
            ends.roads[1].shutdown(socket.SHUT_RDWR)
        assert isinstance(raised[0], (EOFError, OSError))


class TestTcp(TransportContract):
    @pytest.fixture
    def transport(self):
        return Tcp()


class Reading:
    """One-sided, within one process: only tags go by the connection; the receiver reads where the sender's memory was registered.

    So an RDMA read works: the key of a region is told at the begin, and `finish` waits until the other end has read all.
    """

    name = "reading"

    def __init__(self) -> None:
        self.regions: dict[bytes, memoryview] = {}

    def register(self, memory: memoryview) -> Keyed:
        return Keyed(self, os.urandom(8), memory)

    def sender(self, road: socket.socket, region: Keyed) -> ReadingSender:
        prepare(road)
        road.sendall(region.key)
        return ReadingSender(road, region.memory)

    def receiver(self, road: socket.socket, region: Keyed) -> ReadingReceiver:
        prepare(road)
        return ReadingReceiver(road, self)


class Keyed(Plain):
    def __init__(self, way: Reading, key: bytes, memory: memoryview) -> None:
        super().__init__(memory)
        self.__dict__.update(key=key, way=way)
        way.regions[key] = memory

    def close(self) -> None:
        self.way.regions.pop(self.key, None)


class ReadingSender(TcpSender):
    def send(self, tag: bytes, begin: int, end: int, pace=None) -> None:
        if pace is not None:
            pace(end - begin)
        place = struct.pack(">QQ", begin, end)
        memory, self._memory = self._memory, memoryview(place)
        try:
            super().send(tag, 0, len(place))
        finally:
            self._memory = memory

    def finish(self, tag: bytes) -> None:
        self.send(tag, 0, 0)
        self._told(b"read")

    def _told(self, word: bytes) -> None:
        try:
            if self._road.recv(len(word), socket.MSG_WAITALL) != word:
                raise EOFError
        except BlockingIOError:
            raise TimeoutError("no byte moved") from None


class ReadingReceiver(TcpReceiver):
    def __init__(self, road: socket.socket, way: Reading) -> None:
        super().__init__(road)
        self._way = way
        self._key = b""

    def receive(self, tag_bytes: int, place) -> bytes:
        self._key = self._key or self._word(8)
        tag = self._word(tag_bytes)
        begin, end = struct.unpack(">QQ", self._word(16))
        view = place(tag)
        view[:] = self._way.regions[self._key][begin:end]
        if begin == end:
            self._road.sendall(b"read")
        return tag

    def _word(self, num_bytes: int) -> bytes:
        return super().receive(num_bytes, lambda _: memoryview(b""))


class TestOneSided(TransportContract):
    """That the interface fits another kind of transport, not just another socket."""

    @pytest.fixture
    def transport(self):
        return Reading()


def test_a_transport_is_found_by_its_name(monkeypatch):
    assert isinstance(module.find("tcp"), Tcp)

    class Door:
        name = "reading"

        def load(self):
            return Reading

    monkeypatch.setattr(module.importlib.metadata, "entry_points", lambda group: [Door()] if group == "resilient.transports" else [])
    assert module.find("reading").name == "reading"
    with pytest.raises(ConfigError, match="one of reading, tcp expected, 'rdma' found"):
        module.find("rdma")
