"""Build: the inner groups of one round, made in the background.

Think of a crew that rigs the new stage while the old scene plays to its end: it waits for everybody's trunk, puts up what all have
brought, and drops everything when the director calls the next plan.

Contract: a thread of its own from the beginning; `ready` is set when it is done, `error` says why it failed. `cancel` is thread-safe,
idempotent, and ends whatever it waits for: every round has its own store client and prefix, and its socket is shut, so nobody waits for
somebody who will not come. `make` belongs to the training thread.
While ranks set up (`Plan.starting`) they may have come to different places of their script: only groups that all their members have made
are built, and for each it is agreed how many collectives are settled (train/rehearsal.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist

from resilient.train.inner import Inner, largest, tcp_sockets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient.core.messages import Seated
    from resilient.train.group import Group

ARRIVE_TIMEOUT: Final = timedelta(hours=2)  # a newcomer's set-up may be long; a newer round ends the wait at once
CONNECT_TIMEOUT: Final = timedelta(seconds=30)  # everybody has arrived: only connections are still to be made
CONNECTING_S: Final = 1.0  # for the round before, whose socket would be taken for ours; it may hang at a store that is gone
_CONNECTING: Final = threading.Lock()


class Build(threading.Thread):
    """See the module's text."""

    def __init__(self, seated: Seated, groups: Sequence[Group], timeout: timedelta) -> None:
        """Starts at once."""
        super().__init__(name=f"resilient-build-{seated.round}", daemon=True)
        self.round = seated.round
        self.inners: dict[str, Inner] = {}
        self.error: str = ""
        self.ready = threading.Event()
        self.store: Any = None
        self._seated, self._groups, self._timeout = seated, list(groups), timeout
        self.settled: dict[str, int] = {}  # group -> collectives of the set-up that some member knows to be behind all
        self._lock = threading.Lock()
        self._cancelled = False
        self._line: list[socket.socket] = []
        self.start()

    def run(self) -> None:
        """The thread."""
        try:
            self._build()
        except (RuntimeError, OSError, ValueError) as error:  # torch's own are RuntimeErrors; no descriptors left; bytes that are no ports
            self.error = str(error) or type(error).__name__
        finally:
            self.ready.set()

    def _build(self) -> None:
        store = self._connect()
        world, starting = self._seated.world_size, self._seated.plan.starting
        for group in self._groups if starting else ():
            store.add(f"has/{group.key}", 1)
        if store.add("arrived", 1) == world:
            store.set("complete", b"1")
        store.wait(["complete"], ARRIVE_TIMEOUT)
        for group in self._groups:
            if starting and store.add(f"has/{group.key}", 0) < group.size():
                continue  # some members' scripts have not come to it: it is made when they have
            inner = self._make(group)
            if starting:
                self.settled[group.key] = largest(inner, group.settled)

    def make(self, group: Group) -> Inner:
        """The inner group for a group that not all members had when the round was joined. Waits for them, or until `cancel`."""
        found: list[Inner] = []
        errors: list[Exception] = []
        over = threading.Event()

        def work() -> None:
            try:
                found.append(self._make_late(group))
            except (RuntimeError, OSError, ValueError) as error:
                errors.append(error)
            finally:
                over.set()

        # On a thread: gloo waits for a member that died while it connected, and not even its own timeout ends that.
        threading.Thread(target=work, name="resilient-make", daemon=True).start()
        while not over.wait(0.02):
            if self._cancelled:
                raise RuntimeError("the round broke")
        if errors:
            raise RuntimeError(str(errors[0])) from errors[0]
        return found[0]

    def _make_late(self, group: Group) -> Inner:
        came = f"came/{group.key}"
        if self.store.add(came, 1) == group.size():
            self.store.set(f"{came}/all", b"1")
        self.store.wait([f"{came}/all"], ARRIVE_TIMEOUT)
        return self._make(group)

    def _make(self, group: Group) -> Inner:
        store = dist.PrefixStore(f"{group.key}/", self.store)
        inner = Inner(group.kind, store, group.rank(), group.size(), CONNECT_TIMEOUT)
        inner.patience(self._timeout)
        with self._lock:
            self.inners[group.key] = inner
            if self._cancelled:
                inner.cut()
        return inner

    def _connect(self) -> Any:
        host, _, port = self._seated.store.rpartition(":")
        alone = _CONNECTING.acquire(timeout=CONNECTING_S)
        try:
            before = tcp_sockets()
            client = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=CONNECT_TIMEOUT)
            line = [sock for sock in _duplicates(tcp_sockets() - before) if _peer_port(sock) == int(port)]
        finally:
            if alone:
                _CONNECTING.release()
        with self._lock:
            self._line = line
            if self._cancelled:
                self._shut()
        self.store = dist.PrefixStore(f"round/{self.round}/", client)
        return self.store

    def cancel(self) -> None:
        """Give up: whatever the thread waits for fails at once. Thread-safe, idempotent."""
        with self._lock:
            self._cancelled = True
            self._shut()
            for inner in self.inners.values():
                inner.cut()

    def _shut(self) -> None:
        for sock in self._line:
            with contextlib.suppress(OSError):  # the store is gone already
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._line = []


def _duplicates(names: set[tuple[int, str]]) -> list[socket.socket]:
    found = []
    for fd, _ in names:
        with contextlib.suppress(OSError):  # closed in between
            found.append(socket.socket(fileno=os.dup(fd)))
    return found


def _peer_port(sock: socket.socket) -> int:
    try:
        return int(sock.getpeername()[1])
    except (OSError, IndexError):  # not connected, or not TCP
        return -1
