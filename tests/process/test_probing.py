"""The agent's end of its prober, with real ones: killed again and again, stopped, talking nonsense, strangers' sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import time

import pytest
from installed import path_with
from resilient_agents import kernel
from resilient_agents import probing as module
from resilient_agents.probing import Probing, senses

pytestmark = pytest.mark.process
DEADLINE_S = 60.0


class Watched:
    """A Probing, and what it told."""

    def __init__(self, tmp_path, daemon: str = "") -> None:
        self.told: list = []
        (tmp_path / "dev").mkdir(exist_ok=True)
        self.probing = Probing(senses("auto", str(tmp_path), daemon, str(tmp_path), "", "/dev/shm"))

    async def __aenter__(self):
        self.probing.start(self.told.extend)
        return self

    async def __aexit__(self, *_):
        pid = self.probing.pid
        await self.probing.close()
        assert self.probing.pid == 0
        assert not pid or kernel.stat(pid) is None

    async def until(self, what):
        end = time.monotonic() + DEADLINE_S
        while not (found := what()):
            assert time.monotonic() < end, self.told
            await asyncio.sleep(0.01)
        return found

    def lost(self) -> list[str]:
        return [f.text for f in self.told if f.kind == "prober-lost"]


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", path_with(tmp_path / "site"))


async def test_a_prober_that_dies_is_replaced_until_it_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_MAX_S", 0.01)
    async with Watched(tmp_path) as watched:
        for i in range(module.DEATHS_MAX):
            os.kill(await watched.until(lambda: watched.probing.pid), signal.SIGKILL)
            await watched.until(lambda i=i: len(watched.lost()) == i + 1 and (watched.probing.pid or i + 1 == module.DEATHS_MAX))
        assert "exit code -9" in watched.lost()[0] and "another one is started" in watched.lost()[0]
        assert "no further one is started" in watched.lost()[-1]
        assert watched.probing.pid == 0


@pytest.mark.long
async def test_a_prober_that_stands_still_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_S", 7.0)
    async with Watched(tmp_path) as watched:
        first = await watched.until(lambda: watched.probing.pid)
        os.kill(first, signal.SIGSTOP)
        await watched.until(watched.lost)
        assert "has not said a word for 7 s" in watched.lost()[0]
        assert await watched.until(lambda: watched.probing.pid) != first


async def nonsense(path: str, data: bytes) -> asyncio.Server:
    async def answer(reader, writer):
        writer.write(data)
        await writer.drain()
        await reader.read()  # until it is hung up on
        writer.close()

    return await asyncio.start_unix_server(answer, path)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n" * 100, struct.pack(">I", 1 << 31), struct.pack(">I", 8) + b"\0" * 8], ids=["text", "long", "wrong"]
)
async def test_a_daemon_that_talks_nonsense_is_hung_up_on_and_our_own_eyes_take_over(tmp_path, data):
    server = await nonsense(str(tmp_path / "d"), data)
    async with server, Watched(tmp_path, str(tmp_path / "d")) as watched:
        await watched.until(watched.lost)
        assert "resilient-agent talks nonsense" in watched.lost()[0] and "looks at its node itself" in watched.lost()[0]
        assert await watched.until(lambda: watched.probing.pid)


async def test_a_socket_that_nobody_serves_is_none(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "d"))
    async with Watched(tmp_path, str(tmp_path / "d")) as watched:
        await watched.until(lambda: watched.probing.pid)
        assert watched.probing._scopes == ("node", "run") and not watched.lost()
