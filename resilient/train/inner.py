"""Inner groups: the real gloo or nccl group of one round, and how to get free of it.

Think of a telephone call: `Inner` is the connection, not the telephone. It is made once per round, it can be cut from another thread
at any time, and after that it is never used again.

Contract: construction blocks until every member of the group has come, so it happens in a builder's thread (train/build.py). `cut()`
is thread-safe, idempotent and returns at once; every operation in flight then fails within milliseconds, on this side and on the
neighbours', or is given up by `wait`. `Inner` is dropped by its last user, never on one of gloo's own threads.

Why sockets: `ProcessGroupGloo.abort()` does nothing to an operation in flight, and a peer that is silent (stopped, power cut) sends
no reset. So the group's own connected sockets are shut down. Which are its own: those that appeared while it was made and whose local
or remote port is one of the members' gloo listeners; the members tell each other these ports through the store. A socket that the
user's code opened at the same moment is therefore never touched, nor is a listener (gloo would call abort()), nor the store's.

Why half a shutdown: when a connection ends, gloo tells the operations that have not begun to send or receive, but forgets those it is in
the middle of: a send that waits for room or whose write was just refused (EPIPE, ECONNRESET), and a message of which a part has come
(gloo/transport/tcp/pair.cc, signalException: nothing of `rx_`, and of `tx_` only what has no unbound buffer). Those end with the group's
timeout, half an hour later. With both directions shut, every tenth cut did that, because gloo answered a message still unread with a
refused write before it came to the end of the stream. With only the receiving one shut, gloo reads to the end, drops the connection
and fails the operation, and no write is ever refused: not to us, and, since our duplicate keeps the connection up for LINGER_S, not to
the neighbour either, who by then is cut himself. What remains is a message cut in two, thus large ones; `wait` gives these up.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SLICE = timedelta(seconds=0.05)  # how soon a waiting thread sees that its group was cut; a slice costs 0.2 ms of processor
MOMENT = timedelta(seconds=0.001)
GRACE_S = 0.05  # a cut operation fails within milliseconds, or never
LINGER_S = 0.25  # between our end of a group and what its neighbours see of it; as a rule their own agents tell them sooner


class Inner:
    """One group of one round. `group` is torch's own backend object."""

    def __init__(self, kind: str, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        """Build it: blocks until all members came. Raises RuntimeError (gloo, nccl, store) when they did not.

        kind: "gloo" or "nccl". store: this round's store under a prefix of this group's own.
        """
        self.kind = kind
        self._lock = threading.Lock()
        self._cut_s = math.inf  # when, on the monotonic clock
        self._forgot = False  # gloo's threads hang in some operation, those behind it will not even begin
        before = tcp_sockets()
        self.group = _make(kind, store, rank, size, timeout)
        self._sockets = _own_sockets(before, store, rank, size) if kind == "gloo" else []

    def patience(self, timeout: timedelta) -> None:
        """Give operations this long, whatever the construction was given."""
        self.group._set_default_timeout(timeout)  # noqa: SLF001  torch's own set_timeout does the same

    def wait(self, work: Any) -> None:
        """Wait for an operation, but not for one that gloo forgot as the group was cut. RuntimeError: it failed, or was given up.

        work: anything whose `wait` heeds its timeout and may be called again: gloo's collectives but reduce-scatters, `Several`, `Apart`.
        A thread that waits for nccl's is freed by its abort.
        """
        if self.kind == "nccl":
            work.wait()
            return
        while True:
            try:
                work.wait(MOMENT if self._forgot else SLICE)
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # it may have ended well just after the slice: only the work knows
                    return
                if time.monotonic() - self._cut_s < GRACE_S:
                    continue
                if not self._forgot:
                    self._forgot = True
                    threading.Thread(target=_outlast, args=(work, self.group), name="resilient-outlast", daemon=True).start()
                raise
            else:
                return

    def cut(self) -> None:
        """Make every operation in flight fail, here and at the neighbours."""
        with self._lock:
            if self._cut_s < math.inf:
                return
            self._cut_s = time.monotonic()
        if self.kind == "nccl":
            self.group.abort()
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):  # already reset by the peer
                sock.shutdown(socket.SHUT_RD)
        later = threading.Timer(LINGER_S, _close, (sockets,))
        later.daemon = True
        later.start()


class Apart:
    """A work that is waited for on a thread of its own.

    For gloo's send and receive: a timeout of theirs would break the group, and there is no other way to stop waiting.
    """

    def __init__(self, work: Any) -> None:
        """Starts at once."""
        self._over = threading.Event()
        self._error: RuntimeError | None = None
        threading.Thread(target=self._run, args=(work,), name="resilient-apart", daemon=True).start()

    def _run(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:  # gloo's only way to say that a peer is gone
            self._error = error
        finally:
            self._over.set()

    def wait(self, *timeout: timedelta) -> None:
        """Until it is over; RuntimeError if it failed, or is not over by then."""
        if not self._over.wait(*(limit.total_seconds() for limit in timeout)):
            msg = "not over yet"
            raise RuntimeError(msg)
        if self._error is not None:
            raise self._error

    def is_completed(self) -> bool:
        """Whether it is over."""
        return self._over.is_set()


def _close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _outlast(work: Any, group: Any) -> None:  # noqa: ARG001  held, not used
    """Hold a forgotten operation and its group until gloo's own timeout ends it: gloo's destructor joins the thread that is in it."""
    with contextlib.suppress(RuntimeError):
        work.wait()


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
