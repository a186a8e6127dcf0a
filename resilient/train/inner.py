"""Inner groups: the real gloo or nccl group of one round, and how to get free of it.

Think of a telephone call: `Inner` is the connection, not the telephone. It is made once per round, it can be cut from another thread
at any time, and after that it is never used again.

Contract: construction blocks until every member of the group has come, so it happens in a builder's thread (train/comm.py). `cut()`
is thread-safe, idempotent and returns at once; every operation in flight then fails within milliseconds, on this side and on the
neighbours'. `Inner` is dropped by its last user, never on one of gloo's own threads.

Why sockets: `ProcessGroupGloo.abort()` does nothing to an operation in flight, and a peer that is silent (stopped, power cut) sends
no reset. So the group's own connected sockets are shut down. Which are its own: those that appeared while it was made and whose local
or remote port is one of the members' gloo listeners; the members tell each other these ports through the store. A socket that the
user's code opened at the same moment is therefore never touched, nor is a listener (gloo would call abort()), nor the store's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SLICE = timedelta(seconds=0.25)  # a cut operation fails within milliseconds


class Inner:
    """One group of one round. `group` is torch's own backend object."""

    def __init__(self, kind: str, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        """Build it: blocks until all members came. Raises RuntimeError (gloo, nccl, store) when they did not.

        kind: "gloo" or "nccl". store: this round's store under a prefix of this group's own.
        """
        self.kind = kind
        self._lock = threading.Lock()
        self._is_cut = False
        before = tcp_sockets()
        self.group = _make(kind, store, rank, size, timeout)
        self._sockets = _own_sockets(before, store, rank, size) if kind == "gloo" else []

    def patience(self, timeout: timedelta) -> None:
        """Give operations this long, whatever the construction was given."""
        self.group._set_default_timeout(timeout)  # noqa: SLF001  torch's own set_timeout does the same

    def wait(self, work: Any) -> None:
        """Wait for a collective, but not for one whose group was cut a good while ago: nothing will come through it any more.

        Seen with gloo: an operation begun while the sockets were being shut down that neither ended nor failed.
        """
        while True:
            cut_before = self._is_cut
            try:
                work.wait(SLICE)
            except RuntimeError:
                if work.is_completed() or cut_before:
                    raise
            else:
                return

    def cut(self) -> None:
        """Make every operation in flight fail, here and at the neighbours."""
        with self._lock:
            if self._is_cut:
                return
            self._is_cut = True
        if self.kind == "nccl":
            self.group.abort()
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # already reset by the peer
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._sockets = []


def largest(inner: Inner, value: int) -> int:
    """The largest `value` of all members; also a barrier. Raises RuntimeError when the group is cut."""
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
    tensor = torch.tensor([value], dtype=torch.int64, device="cuda" if inner.kind == "nccl" else "cpu")
    inner.wait(inner.group.allreduce([tensor], options))
    return int(tensor.item())


def _make(kind: str, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    if kind == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout  # noqa: SLF001  torch's own init_process_group sets it the same way
    return dist.ProcessGroupNCCL(store, rank, size, options)


def tcp_sockets() -> set[tuple[int, str]]:
    """(descriptor, inode) of every socket of this process; the inode tells a reused descriptor from an old one."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor is gone by now
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found.add((int(name), target))
    return found


def _own_sockets(before: set[tuple[int, str]], store: Any, rank: int, size: int) -> list[socket.socket]:
    """Duplicates of the group's connected sockets, found by the members' listening ports."""
    listening, connected = set(), []
    for fd, _ in tcp_sockets() - before:
        try:
            sock = socket.socket(fileno=os.dup(fd))
        except OSError:  # closed in between
            continue
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listening.add(sock.getsockname()[1])
            else:
                connected.append(sock)
                continue
        sock.close()
    store.set(f"ports/{rank}", ",".join(map(str, sorted(listening))))
    ports = set(listening)
    for text in store.multi_get([f"ports/{i}" for i in range(size)]):
        ports.update(int(port) for port in text.decode().split(",") if port)
    own = []
    for sock in connected:
        with contextlib.suppress(OSError):  # not connected any more
            if sock.getsockname()[1] in ports or sock.getpeername()[1] in ports:
                own.append(sock)
                continue
        sock.close()
    return own
