"""A file system that fails when it is told to: fsspec's view of a real directory, with something before every operation.

Faulty.before = lambda number, what, path: ...    # may raise, wait, kill this process

As a program it is a vault's process in which two ranks write checkpoints: faulty.py URL DIRECTORY FIRST_STEP LAST_STEP [WHAT NUMBER]: it
kills itself before its NUMBERth operation of that kind.
"""

from __future__ import annotations

import asyncio
import io
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

WAIT_S = 30.0


class Faulty(AbstractFileSystem):
    protocol = "faulty"
    cachable = False
    root_marker = ""
    before: ClassVar[Callable[[int, str, str], None]] = lambda _number, _what, _path: None
    count: ClassVar[int] = 0
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _real: ClassVar[LocalFileSystem] = LocalFileSystem()

    @classmethod
    def tell(cls, what: str, path: str) -> None:
        with cls._lock:
            cls.count += 1
            number = cls.count
        cls.before(number, what, path)

    @classmethod
    def reset(cls) -> None:
        cls.count, cls.before = 0, lambda _number, _what, _path: None

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        self.tell("ls", path)
        return self._real.ls(path, detail=detail)

    def info(self, path: str, **_: Any) -> Any:
        self.tell("info", path)
        return self._real.info(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.tell("makedirs", path)
        self._real.makedirs(path, exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:
        self.tell("rm", path)
        os.unlink(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        for name in sorted(os.listdir(path)):
            self.rm_file(f"{path}/{name}")
        self.tell("rmdir", path)
        os.rmdir(path)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        self.tell("open", path)
        return _File(path) if mode == "wb" else open(path, mode)


class _File(io.FileIO):
    def __init__(self, path: str) -> None:
        super().__init__(path, "wb")
        self._path = path

    def write(self, data: Any) -> int:
        half = len(data) // 2
        super().write(data[:half])
        Faulty.tell("write", self._path)
        return half + super().write(data[half:])

    def close(self) -> None:
        if self.closed:
            return
        try:
            Faulty.tell("close", self._path)
        finally:
            super().close()


fsspec.register_implementation("faulty", Faulty, clobber=True)


async def main(url: str, directory: str, first: int, last: int, kind: str = "", left: int = 0) -> None:
    from test_vault import Worker, layout, until, vault

    from resilient.core.machine import VaultDo

    def before(_number: int, what: str, path: str) -> None:
        nonlocal left
        left -= what == kind
        if what == kind and left == 0:
            print("killed before", what, path.rpartition("/")[2], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    Faulty.before = before
    ranks = (0, 1)
    async with vault(pathlib.Path(directory), url=url) as keeper:
        await until(lambda: keeper.known().available is not None, WAIT_S)
        workers = [Worker(keeper, layout(rank)) for rank in ranks]
        for step in range(first, last + 1, 10):
            for worker in workers:
                worker.own.write_start(step, b"")
                worker.snapshot(step, len(ranks))
            parts = await until(
                lambda step=step: len(p := [p for p in keeper.known().persisted if p.step == step]) == len(ranks) and p,
                WAIT_S,
                poke=keeper.poke,
            )
            keeper.do(VaultDo(commit=step, manifest=tuple(parts), ranks=ranks, world_size=len(ranks)))
            await until(lambda step=step: keeper.known().committed == step, WAIT_S)
            print("committed", step, flush=True)
        assert await keeper.settle(WAIT_S)


if __name__ == "__main__":
    import faulty  # the class that is registered, and not this module's twin

    asyncio.run(faulty.main(*sys.argv[1:3], *map(int, sys.argv[3:5]), *sys.argv[5:6], *map(int, sys.argv[6:])))
