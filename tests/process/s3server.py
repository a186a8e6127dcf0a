"""A real S3 server in a process of its own (moto's), and an HTTP proxy before it that fails when it is told to.

with Server() as server, Proxy(server.port) as proxy:
    proxy.fault = lambda number, line: "reset" if number % 3 == 0 else ""
    with options(proxy.port):
        DiskTier("s3://bucket/run")
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

import fsspec

START_S: Final = 60.0
LINE: Final = "HTTP/1.1 {} Told So\r\nContent-Length: {}\r\nContent-Type: application/xml\r\nConnection: close\r\n\r\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server:
    """Empty, with one bucket, named "bucket"."""

    def __enter__(self) -> Self:
        self.port = free_port()
        self.start()
        return self

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.port}/bucket", method="PUT"), timeout=10).close()
                return
            assert self.process.poll() is None and time.monotonic() < end, "the S3 server did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.kill()


def settings(port: int, *, read_timeout_s: float = 15.0, retries: int = 0) -> dict[str, Any]:
    """What s3fs has to know."""
    config = {
        "connect_timeout": 2,
        "read_timeout": read_timeout_s,
        "retries": {"max_attempts": retries},
        "s3": {"addressing_style": "path"},
    }
    return {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": "test",
        "secret": "test",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": config,
    }


def environment(port: int, **words: Any) -> dict[str, str]:
    """The same, for a process that is started."""
    return {"FSSPEC_S3": json.dumps(settings(port, **words))}


@contextlib.contextmanager
def options(port: int, **words: Any) -> Iterator[None]:
    """The same, for this one."""
    before = fsspec.config.conf.get("s3")
    fsspec.config.conf["s3"] = settings(port, **words)
    try:
        yield
    finally:
        fsspec.config.conf.pop("s3")
        if before is not None:
            fsspec.config.conf["s3"] = before


class Proxy:
    """One request per connection. `fault(number, request line)` says what becomes of it: "" (handed on), "500", "503", "reset", "cut", "hang",
    "garbage", "late" (the server does it, the answer is lost)."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self.fault: Callable[[int, str], str] = lambda _number, _line: ""
        self.lines: list[str] = []
        self.faults = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(60)
            request = _message(connection)
            if not request:
                return
            line = request.partition(b"\r\n")[0].decode()
            with self._lock:
                self.lines.append(line)
                fault = self.fault(len(self.lines), line)
                self.faults += bool(fault)
            if fault == "hang":
                self._closing.wait(60)
                return
            answer = b""
            if fault in {"", "late", "cut"}:
                answer = self._ask(request)
            if fault in {"500", "503"}:
                text = f"<Error><Code>{'SlowDown' if fault == '503' else 'InternalError'}</Code><Message>no</Message></Error>"
                answer = (LINE.format(fault, len(text)) + text).encode()
            if fault == "garbage":
                answer = (LINE.format("200", 9) + "<garb<age").encode()
            if fault in {"reset", "late"}:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return
            connection.sendall(answer[: len(answer) - 3] if fault == "cut" else answer)

    def _ask(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._behind), timeout=60) as server:
            head, _, body = request.partition(b"\r\n\r\n")
            kept = [row for row in head.split(b"\r\n") if not row.lower().startswith((b"connection:", b"expect:"))]
            server.sendall(b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n" + body)
            pieces = []
            while piece := server.recv(1 << 20):
                pieces.append(piece)
        return b"".join(pieces)


def _message(connection: socket.socket) -> bytes:
    """A request, whole: its length is announced, or it comes in chunks."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := connection.recv(1 << 20)):
            return b""
        data += piece
    head = data.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    fields = {name.strip(): value.strip() for name, _, value in (row.partition(b":") for row in head[1:])}
    if fields.get(b"expect") == b"100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    begin = data.index(b"\r\n\r\n") + 4
    length = int(fields.get(b"content-length", b"0"))
    parts, size = [data], len(data)
    chunked = fields.get(b"transfer-encoding") == b"chunked"
    while (not parts[-1].endswith(b"0\r\n\r\n") or size == begin) if chunked else size < begin + length:
        if not (piece := connection.recv(1 << 20)):
            return b""
        parts.append(piece)
        size += len(piece)
    return b"".join(parts)
