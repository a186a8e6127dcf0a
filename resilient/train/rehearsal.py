"""The rehearsal: collectives before the first step, made so that a newcomer can come into the middle of them.

Think of an orchestra that tunes. If a player falls over, nobody goes home: the substitute reads in the minutes what was agreed, and at the
note where they end, all who had begun that note play it again together.

How: every collective of a set-up is followed by a barrier of its group. Whoever is past the barrier knows that all members have the result,
so the members differ by one collective at most. When a round breaks, the builders of the next one (train/build.py) agree for each group how
many are **settled**, that is behind anybody's barrier. The collective that this rank is in is then either settled, and its result here is
good, or it is made again from the inputs that were kept. A newcomer recalls what its predecessor had; where those minutes end it becomes
the rank. Recorded is before the barrier, so the minutes are never behind what others rely on. Groups that its predecessor had made after
its last collective it makes there, and the others with it, before they go on (`Comm.catch_up`).

Contract: only before the first step (`Recorder.mode` is not "off"); `perform` blocks until the collective is settled, in whatever round.
Sends, receives, and what its caller does not wait for at once (`async_op=True`) have no barrier: a set-up that breaks after one of them
starts again with the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from resilient.core.messages import Unrepeatable
from resilient.core.policy import infrastructure
from resilient.train.inner import largest
from resilient.train.recorder import OBJECTS_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.train.comm import Comm
    from resilient.train.desk import Desk
    from resilient.train.group import Operation
    from resilient.train.inner import Inner
    from resilient.train.recorder import Known


class Rehearsal:
    """See the module's text."""

    def __init__(self, comm: Comm, desk: Desk, seat: Callable[[], None], leave: Callable[[str], NoReturn]) -> None:
        """seat(): wait for a newer round and join it. leave(why): end this process."""
        self.enlisted: Callable[[], None] = lambda: None  # called when a newcomer becomes the rank
        self._comm, self._desk, self._recorder, self._seat, self._leave = comm, desk, comm.recorder, seat, leave
        self._unsettled = False  # operations without a barrier were made

    def perform(self, op: Operation) -> None:
        """Bring `op` to its end on all members of its group."""
        group, given = op.group, [tensor.clone() for tensor in op.outputs]
        self._recorder.number(op)
        known = self._recall(op) if self._recorder.mode == "recall" else "nothing"
        if known != "settled":
            self._settle(op, given, held=known == "last")
        group.settled += 1

    def _settle(self, op: Operation, given: list[torch.Tensor], *, held: bool) -> None:
        """held: the result is here; given: what it was made from."""
        if self._recorder.mode == "recall":
            self.enlist()
        seen: set[str] = set()  # what this operation failed with
        while True:
            self.enter()
            if op.group.agreed > op.group.settled:
                if not held:
                    self.refuse(f"{op.key} is behind the others, and its result is not known here")
                return
            for tensor, value in zip(op.outputs, given, strict=True):
                tensor.copy_(value)
            held = False
            inner = op.group.inner
            assert inner is not None, f"group {op.group.key} has no inner group in live round {self._comm.round}"
            try:
                _finish(inner, op.launch(inner.group))
                self._recorder.put(op)
                held = True
                largest(inner, 0)
            except RuntimeError as error:  # gloo's and nccl's only way to say that a peer is gone
                text = str(error).splitlines()[0].rpartition("] ")[2]
                if not held and text in seen and not infrastructure(str(error)):
                    raise  # in two rounds the same, and no peer's fault: the script's own
                seen.add(text)
                self._comm.lost(inner, f"{op.key}: {error}")
            else:
                return

    def loose(self, op: Operation) -> bool:
        """Before an operation without a barrier: a send, a receive, one that its caller does not wait for. True: it was recalled."""
        self._recorder.number(op)
        if self._recorder.mode == "recall":
            if self._recall(op) != "nothing":
                return True
            self.enlist()
        self.enter()
        self._unsettled = True
        return False

    def _recall(self, op: Operation) -> Known:
        known = self._recorder.recall(op)
        if known == "unreadable":
            self.refuse(f"{op.key}: objects of more than {OBJECTS_BYTES >> 20} MiB are not kept for newcomers")
        return known

    def enlist(self) -> None:
        """The minutes end: from here on this process is the rank whose set-up it repeated."""
        self._recorder.mode = "record"
        self._desk.standby = False
        self.enlisted()
        self.enter()

    def enter(self) -> None:
        """Be in a sound round, with all groups that are made so far."""
        while self._comm.mode != "live" or not self._comm.catch_up():
            if self._unsettled:
                self.refuse("it broke after sends, receives or async operations, of which nobody knows how far they came")
            self._seat()

    def refuse(self, reason: str) -> NoReturn:
        """This set-up cannot be gone on with: the whole group has to start again."""
        self._desk.send(Unrepeatable(reason=f"set-up of rank {self._comm.rank}: {reason}"))
        self._leave(reason)


def _finish(inner: Inner, work: object) -> None:
    inner.wait(work)
    if inner.kind == "nccl":
        torch.cuda.synchronize()  # waiting only puts the work in order on the device
