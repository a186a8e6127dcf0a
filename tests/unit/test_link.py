"""Links: only those who hold the token get one, and everybody else is told why or dropped. Over socketpairs: no port, no sleep."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from resilient.core.messages import Assignment, Fenced, Join, Report, Suspect, WorkerUp
from resilient.errors import ProtocolError
from resilient.wire import link
from resilient.wire.frames import Decoder, encode


@contextlib.asynccontextmanager
async def accepting(results: list[Any], *, token: str = "right", run: str = "r") -> AsyncIterator[int]:
    """A server that puts the links it accepted, or why it did not, into `results`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            results.append(await link.accept(reader, writer, Report, token=token, run=run, timeout_s=2.0))
        except ProtocolError as error:
            results.append(error)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work
        for _ in range(3):
            await asyncio.sleep(0)  # a connection that was aborted is closed in the loop's next turn

    asyncio.run(bounded())


def test_both_sides_get_a_link_that_carries_messages() -> None:
    async def scene() -> None:
        results: list[Any] = []
        async with accepting(results) as port:
            ours = await link.connect("127.0.0.1", port, Assignment, token="right", run="r", name="n7")
            ours.send(Report(run="r", node="n7", boot=1, seq=1))
            theirs = await _first(results)
            assert theirs.name == "n7"
            assert (await theirs.recv()).node == "n7"
            theirs.send(Assignment(run="r", node="n7", seq=3))
            assert (await ours.recv()).seq == 3
            await ours.close()
            assert await theirs.recv() is None
            await theirs.close()

    run(scene())


async def _first(results: list[Any]) -> Any:
    while not results:  # noqa: ASYNC110 - what fills it is the code under test
        await asyncio.sleep(0.001)
    return results[0]


@pytest.mark.parametrize(("token", "run_id", "reason"), [("wrong", "r", "wrong token"), ("right", "other", "run id")])
def test_a_stranger_is_told_why_on_both_sides(token: str, run_id: str, reason: str) -> None:
    async def scene() -> None:
        results: list[Any] = []
        async with accepting(results) as port:
            with pytest.raises(link.RefusedError, match=reason):
                await link.connect("127.0.0.1", port, Assignment, token=token, run=run_id, name="n0")
            with pytest.raises(ProtocolError, match=reason):
                raise await _first(results)

    run(scene())


def test_an_impostor_that_accepts_everybody_is_found_out() -> None:
    async def scene() -> None:
        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(encode(link.Challenge(nonce=b"n")) + encode(link.Welcome(mac=b"0" * 32)))
            await reader.read()
            writer.close()

        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(link.RefusedError, match="wrong token"):
                await link.connect("127.0.0.1", port, Assignment, token="right", run="r", name="n0")

    run(scene())


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", bytes(64), b"\xff" * 64, encode(Fenced(round=1)), b""])
def test_garbage_is_dropped_with_one_reason(garbage: bytes) -> None:
    async def scene() -> None:
        results: list[Any] = []
        async with accepting(results) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(garbage)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""  # closed, and nothing said
            assert isinstance(await _first(results), ProtocolError)
            assert "\n" not in str(results[0])
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    run(scene())


def test_a_program_that_is_not_ours_is_a_clear_error_on_our_side() -> None:
    async def scene() -> None:
        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            await reader.read(1)
            writer.close()

        server = await asyncio.start_server(other, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ProtocolError, match="a program of ours"):
                await link.connect("127.0.0.1", port, Assignment, token="right", run="r", name="n0")

    run(scene())


# --------------------------------------------------------------------------- AgentLine


@pytest.fixture
def pair() -> Any:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    line = link.AgentLine(ours)
    yield line, theirs
    line.close()
    theirs.close()


def test_a_line_sends_from_many_threads_and_mixes_nothing(pair: Any) -> None:
    line, theirs = pair
    senders = [threading.Thread(target=lambda i=i: [line.send(Suspect(round=i, text="x" * 500)) for _ in range(50)]) for i in range(4)]
    decoder: Decoder[WorkerUp] = Decoder(WorkerUp)
    came: list[WorkerUp] = []
    for sender in senders:
        sender.start()
    while len(came) < 200:
        came += decoder.feed(theirs.recv(1000))
    for sender in senders:
        sender.join(10)
    assert sorted(message.round for message in came) == sorted(list(range(4)) * 50)  # type: ignore[union-attr]


def test_a_line_receives_and_times_out(pair: Any) -> None:
    line, theirs = pair
    assert line.recv(timeout_s=0.0) is None
    assert not line.closed
    theirs.sendall(encode(Fenced(round=1)) + encode(Fenced(round=2))[:3])
    assert line.recv(timeout_s=5.0) == Fenced(round=1)
    assert line.recv(timeout_s=0.01) is None
    theirs.sendall(encode(Fenced(round=2))[3:])
    assert line.recv(timeout_s=5.0) == Fenced(round=2)


def test_a_line_whose_agent_is_gone_is_closed(pair: Any) -> None:
    line, theirs = pair
    theirs.close()
    assert line.recv() is None
    assert line.closed
    with pytest.raises(ConnectionError):
        line.send(Suspect(round=1, text=""))


def test_closing_ends_a_receive_in_another_thread(pair: Any) -> None:
    line, _ = pair
    came: list[Any] = []
    receiver = threading.Thread(target=lambda: came.append(line.recv()))
    receiver.start()
    line.close()
    receiver.join(10)
    assert came == [None]


def test_connecting_where_nobody_listens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        link.AgentLine.connect(str(tmp_path / "nobody"))


def test_connecting(tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        line = link.AgentLine.connect(path)
        accepted, _ = server.accept()
        with accepted:
            line.send(Join(worker="n0.1", pid=1, token="t"))
            assert Decoder[WorkerUp](WorkerUp).feed(accepted.recv(1000)) == [Join(worker="n0.1", pid=1, token="t")]
        line.close()
