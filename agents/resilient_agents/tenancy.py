"""Tenancy: one run writes under a checkpoint URL; a second one is refused.

Think of a towel on a beach chair: whose it is stands on it, and its owner comes by now and then and moves it a little. A towel that nobody
has moved for a while may be taken away; nobody looks at a date on it, for guests' watches differ.

    IN-USE.json    the tenant: run, host, process, and a number that grows with every sign of life

Contract: `claim` is ConfigError if the tenant lives: at once where its process can be seen from here, else at its next sign of life, BEAT_S
away. A tenant whose process is seen to be gone is replaced at once, any other after SILENCE_S without a sign of life, measured here.
A mark that is damaged (it has a digest) is mended by its owner's next sign of life. Storage that does not answer refuses nobody: the claim
is made when it does. `hold` gives signs of life, and says once that another run has taken the place: then this one must end. Of runs that
claim at the same moment the last writer stays; the others learn it at the first beat.
Held by the node that coordinates, for its run. docs/decisions/0013-one-run-per-url.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import socket
from collections.abc import Callable
from typing import Final

import msgspec
import xxhash

from resilient.checkpoint.storage import Storage
from resilient.errors import ConfigError, TierUnavailable
from resilient_agents.lane import Lane

FILE: Final = "IN-USE.json"
BEAT_S: Final = 5.0  # 17,000 small writes a day
SILENCE_S: Final = 30.0  # six beats: a storage that stalls for some of them must not cost a run its place
POLL_S: Final = 1.0
ANSWER_S: Final = 20.0
FAREWELL_S: Final = 5.0
log = logging.getLogger("resilient.vault")


class Tenant(msgspec.Struct, frozen=True):
    """Who writes there."""

    nonce: str
    run: str
    host: str  # for people
    place: str  # where `pid` means something: this boot of the kernel, this space of process ids
    pid: int
    born: str  # when that process was started: a number of the kernel's
    beat: int = 0
    digest: str = ""  # xxh3_128 of this object's JSON with digest = "": a mark that is damaged is nobody's, and must not end a run


class Tenancy:
    """This run's claim to one URL. Used from one event loop."""

    def __init__(self, url: str, run: str) -> None:
        """Nothing is read yet. Raises TierUnavailable if nothing can open such a URL."""
        self._url, self._storage = url, Storage(url)
        self._me = Tenant(secrets.token_hex(8), run, socket.gethostname(), _place(), os.getpid(), _born(os.getpid()))
        self._lane = Lane("checkpoint storage (claim)")
        self._claimed, self._in_trouble = False, False
        self._beating: asyncio.Task[None] | None = None

    async def claim(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the place. Raises ConfigError if another run has it. say: told when that takes longer."""
        try:
            before = await self._read()
            tenant = _tenant(before)
            lives = _lives(tenant) if tenant is not None else None
            if lives is None and before is not None:
                say(f"--checkpoint {self._url}: used by {_name(tenant)} before; waiting for a sign of life, {SILENCE_S:.0f} s at most")
                for _ in range(round(SILENCE_S / POLL_S)):
                    await asyncio.sleep(POLL_S)
                    now = await self._read()
                    if now != before:
                        lives, tenant = now is not None, _tenant(now) or tenant
                        break
            if lives:
                raise ConfigError(self._refusal(tenant))
            await self._write()
            self._claimed = True
            await self._lane.run(self._sweep, deadline_s=ANSWER_S)
        except TierUnavailable as error:
            self._warn(error)

    def hold(self, lost: Callable[[str], None]) -> None:
        """Give signs of life from now on. lost: another run has taken the place."""
        self._beating = asyncio.create_task(self._beat(lost))

    async def release(self) -> None:
        """The run is over: others may have the place."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        with contextlib.suppress(TierUnavailable, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                if self._claimed and self._is_ours(await self._read()):
                    await self._lane.run(lambda: self._storage.remove(FILE), deadline_s=ANSWER_S)
        self._lane.close()

    async def _beat(self, lost: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                if not self._claimed:
                    await self.claim()
                    continue
                found = await self._read()
                tenant = _tenant(found)
                if tenant is not None and tenant.nonce != self._me.nonce:
                    raise ConfigError(self._refusal(tenant))
                await self._write()
                self._in_trouble = False
            except ConfigError as error:
                lost(str(error))
                return
            except TierUnavailable as error:
                self._warn(error)

    def _warn(self, error: TierUnavailable) -> None:
        if not self._in_trouble:
            log.warning("checkpoint URL is %s: %s", "silent about us" if self._claimed else "not claimed yet", error)
        self._in_trouble = True

    def _is_ours(self, data: bytes | None) -> bool:
        tenant = _tenant(data)
        return tenant is not None and tenant.nonce == self._me.nonce

    def _refusal(self, tenant: Tenant | None) -> str:
        return (
            f"--checkpoint {self._url}: one run per URL expected, {_name(tenant)} writes there too ({self._storage.where(FILE)}); "
            "end that one, or give this one a URL of its own"
        )

    async def _read(self) -> bytes | None:
        return await self._lane.run(self._look, deadline_s=ANSWER_S)

    def _look(self) -> bytes | None:
        try:
            return self._storage.read(FILE)
        except FileNotFoundError:
            return None

    def _sweep(self) -> None:
        """What tenants left that were killed while they wrote."""
        for name in self._storage.names():
            if name.startswith(f"{FILE}.") and name.endswith(".part"):
                self._storage.remove(name)

    async def _write(self) -> None:
        self._me = msgspec.structs.replace(self._me, beat=self._me.beat + 1)
        data = encode(self._me)
        await self._lane.run(functools.partial(self._storage.write, FILE, data), deadline_s=ANSWER_S)


def encode(tenant: Tenant) -> bytes:
    """The file's bytes."""
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(tenant, digest=_digest(tenant))), indent=1)


def _digest(tenant: Tenant) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(tenant, digest="")))


def _tenant(data: bytes | None) -> Tenant | None:
    """None also for what nobody can read: then only its changes tell whether somebody lives."""
    try:
        found = msgspec.json.decode(data, type=Tenant) if data is not None else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if found is not None and found.digest == _digest(found) else None


def _name(tenant: Tenant | None) -> str:
    return f"run {tenant.run} (process {tenant.pid} on {tenant.host})" if tenant is not None else "somebody unknown"


def _lives(tenant: Tenant) -> bool | None:
    """None if that cannot be seen from here."""
    return _born(tenant.pid) == tenant.born if tenant.place == _place() else None


def _place() -> str:
    """Processes that see each other under the same numbers have it in common."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # a sandbox without /proc: nobody shares that place
        return secrets.token_hex(8)


def _born(pid: int) -> str:
    """In ticks since the kernel was started; "" if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if fields[0] in {b"Z", b"X"} else fields[19].decode()
