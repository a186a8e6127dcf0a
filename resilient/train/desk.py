"""The desk: the worker's end of the line to its agent, and the thread that listens there.

Think of a hotel's reception: what is asked for is written down, what arrives is put into the right pigeonhole, and whoever needs it comes
and looks, or waits at the counter.

Contract: one daemon thread receives; it acts at once on what cannot wait for the training thread (a fence cuts the groups, a newer seat
starts their rebuilding) and files the rest. Waiting calls belong to the training thread; each has a deadline or ends with the process,
which dies with its agent (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from resilient.core.messages import NONE, Fenced, Leave, Recorded, Seated, Segments, Suspect, Unrecorded
from resilient.errors import ProtocolError, TierUnavailable

if TYPE_CHECKING:
    from resilient.core.messages import Layout, WorkerUp
    from resilient.train.comm import Comm
    from resilient.train.recorder import Recorder
    from resilient.wire.link import AgentLine

SEGMENTS_TIMEOUT_S = 120.0  # pre-faulting 100 GB takes 30 s
RESHAPE_S, RESHAPE_BYTES_S = 300.0, 4 << 20  # more patience than the agent has with storage: its refusal says why, ours could not


class Desk:
    """See the module's text."""

    def __init__(self, line: AgentLine, *, standby: bool) -> None:
        """Listening starts with `listen`."""
        self.standby = standby
        self.eager = False  # start rebuilding groups as soon as a newer seat is known: once all of them are made
        self.recorder: Recorder | None = None
        self.comm: Comm | None = None
        self._line = line
        self._news = threading.Condition()
        self._seated: Seated | None = None
        self._segments: Segments | None = None
        self._closed = False

    def listen(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="resilient-desk", daemon=True).start()

    def send(self, message: WorkerUp) -> None:
        """Tell the agent."""
        self._line.send(message)

    def suspect(self, round_: int, text: str) -> None:
        """Tell the agent that a collective of `round_` failed here."""
        self.send(Suspect(round=round_, text=text))

    # ------------------------------------------------------------------ waiting at the counter

    @property
    def newest(self) -> int:
        """The newest round for which this process has a seat; 0 = none yet."""
        return self._seated.round if self._seated is not None else 0

    def seat_after(self, round_: int) -> Seated:
        """Wait for a seat in a round newer than `round_`. Unbounded: the coordinator's own deadlines end the run."""
        with self._news:
            while self._seated is None or self._seated.round <= round_:
                self._check_open()
                self._news.wait(0.5)
                if self.comm is not None:
                    self.comm.beat()  # waiting for the coordinator's word is no hang of ours
            return self._seated

    def latest(self) -> Seated:
        """The newest seat (there is one)."""
        assert self._seated is not None
        return self._seated

    def segments_for(self, layout: Layout) -> Segments:
        """Ask for this chair's segments and wait. Raises TierUnavailable with the agent's reason."""
        with self._news:
            self._segments = None
        self.send(layout)
        patience_s = SEGMENTS_TIMEOUT_S
        if layout.reshape != NONE:
            patience_s += RESHAPE_S + layout.snapshot_bytes / RESHAPE_BYTES_S
        until = time.monotonic() + patience_s
        with self._news:
            while self._segments is None:
                self._check_open()
                if not self._news.wait(min(1.0, max(0.0, until - time.monotonic()))) and time.monotonic() >= until:
                    msg = f"segments of rank {layout.rank}: no answer of the agent in {patience_s:.0f} s"
                    raise TierUnavailable(msg)
            segments = self._segments
        if segments.error:
            raise TierUnavailable(segments.error)
        return segments

    def _check_open(self) -> None:
        if self._closed:
            msg = "the line to the agent is closed: the agent has ended"
            raise ProtocolError(msg)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            message = self._line.recv()
            if message is None:
                break
            self._take(message)
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _take(self, message: object) -> None:
        match message:
            case Seated():
                if self.comm is not None:
                    self.comm.fence(message.round - 1)
                    if self.eager:
                        self.comm.prepare(message)
                with self._news:
                    if message.round >= self.newest:
                        self._seated = message
                    self._news.notify_all()
            case Fenced():
                if self.comm is not None:
                    self.comm.fence(message.round)
            case Segments():
                with self._news:
                    self._segments = message
                    self._news.notify_all()
            case Recorded() | Unrecorded():
                if self.recorder is not None:
                    self.recorder.deliver(message)
            case Leave() if self.standby and self.newest == 0:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)  # a standby that nobody needs: its script must not run on to its end
            case _:
                pass  # Leave for a seated rank: the agent's SIGTERM is on its way
