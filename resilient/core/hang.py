"""Hang: which worker of a node does not move.

Think of a night watchman with a notebook. For every worker he has written down the longest pause it ever made; a pause three times as
long makes him look again, and only when he has seen the same thing twice does he call. He never calls because of a pause that was
announced (`run.section`), of a worker in a debugger, or after he himself had fallen asleep.

What a pause may last depends on where in the step it is made (`Kind`): loading data, between two collectives, inside one, waiting for the
vote, in the optimizer. Each is learned apart, so that a long one does not excuse a hang in a short one, and anew in each round, for the
people and places have changed. Until `LEARN_STEPS` steps of a round are done, the longest of all kinds counts, and that of the first step.

Contract: `Watch.look` is called with every look at one worker and answers None, or once per pause with what was seen. It calls before
the bound is over: stopped within max(1 s, 1.5 steps); no movement within max(5 s, 3 x the longest pause of that kind), twice that in
the first step of a later round, `first_step_timeout_s` in the first step of all (a compile); at least 30 s for a process that sleeps before
the first collective of its step, for it may wait for data, which its successor would have to wait for as well.
Two witnesses: the page, and that the process used its CPUs alike in two looks one after the other (busy, or blocked).
`pause_s` is the longest pause in the step under way after which it went on: what others are measured by (culprit.py).
Who of those that do not move is to blame is seen only by the coordinator: culprit.py.
Rejected: a fixed timeout (10 to 60 minutes elsewhere); one look (a loaded machine makes everybody pause).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from resilient.core.messages import Msg, Record

STOPPED_MIN_S: Final = 1.0
STOPPED_STEPS: Final = 1.5
STALLED_MIN_S: Final = 5.0
STALLED_GAPS: Final = 3.0
REFORMED: Final = 2.0  # in the first step of a round: newcomers are slower, and restoring is awaited (culprit.py)
EARLY: Final = 0.85  # the bounds are promises to the user: we decide at this part of them, the rest is for looks and reports
WITNESS_S: Final = 0.25  # between the two looks at a process that does not move
ASLEEP_S: Final = 1.0  # a watchman who did not look for this long begins anew
LEARN_STEPS: Final = 5  # of a round, until its bounds are known
DATA_MIN_S: Final = 30.0  # a blocked process before the first collective of its step: storage is slow at times
BUSY: Final = 0.1  # part of one CPU from which on a process counts as running


Kind = Literal["data", "compute", "inside", "vote", "update", "between"]


class Seen(Msg):
    """What a watch has to tell."""

    kind: Literal["stopped", "stalled"]
    since: float  # when it began, by the watchman's clock
    text: str


def kind_of(record: Record) -> Kind:
    """Which part of a step a worker is in."""
    match record.phase:
        case "voted":
            return "vote"
        case "committing":
            return "update"
        case "running" if record.entered > record.completed:
            return "inside"
        case "running":
            return "data" if record.entered == record.begun else "compute"
    return "between"


@dataclass(slots=True)
class Watch:
    """The notebook page of one worker."""

    first_step_timeout_s: float
    step_s: float = 0.0  # running mean of the time between two steps
    pause_s: float = 0.0  # the longest pause that ended in the step under way
    gaps: dict[Kind, float] = field(default_factory=dict)  # the longest pauses learned in this round
    _before_s: float = 0.0  # the longest of the round before
    _first_s: float = 0.0  # and of this round's first step
    _round: int = 0
    _steps: int = 0  # done in this round while it was watched
    _mark: tuple[int, int, int, str] | None = None  # what moves: step, entered, completed, phase
    _kind: Kind = "between"  # of the pause since then
    _beat: float = 0.0  # when the page last moved
    _step_at: float | None = None  # when the last step was completed
    _stopped_at: float | None = None
    _looked_at: float | None = None
    _witness: list[tuple[float, float, str]] = field(default_factory=list)  # (when, cpu_s, busy | blocked)
    _settled: bool = False  # at the last look: past the round's first step, in no section, not stopped
    _told: bool = False  # of this pause, once

    @property
    def gap_s(self) -> float:
        """The longest pause learned, of any kind."""
        return max(self._before_s if self._steps < LEARN_STEPS else 0.0, *self.gaps.values(), 0.0)

    def look(self, record: Record, os_state: str, cpu_s: float, now: float, *, neighbours_run: bool, between: bool = False) -> Seen | None:
        """One look.

        neighbours_run: not all of this node are stopped (that would be an operator, or a frozen machine).
        between: its round is broken and the next one is not joined: it may wait for a newcomer, so only a busy process counts, or one
        that still hangs in a collective of the round that is over.
        """
        asleep = self._looked_at is not None and now - self._looked_at > ASLEEP_S
        self._looked_at = now
        if asleep:
            self._beat, self._stopped_at, self._step_at, self._witness = now, None, None, []
        moved = self._learn(record, now)
        if os_state == "t" or asleep:
            self._stopped_at, self._beat = None, now
            return None
        if os_state == "T":
            return self._stopped(now, neighbours_run=neighbours_run)
        if self._stopped_at is not None:  # it goes on: the pause was not its own
            self._stopped_at, self._beat, self._step_at, self._told = None, now, None, False
        if moved or record.section or record.phase in ("setup", "done"):
            self._witness = []
            return None
        return self._stalled(record, cpu_s, now, between=between)

    def _learn(self, record: Record, now: float) -> bool:
        mark = (record.step, record.entered, record.completed, record.phase)
        beat = max(self._beat, now - record.idle_s)
        moved = mark != self._mark or beat > self._beat + 1e-3
        if not moved:
            self._settled = self._settled and not record.section
            return False
        if record.round != self._round:
            self._before_s, self._first_s, self.gaps, self._steps, self._round = self.gap_s, 0.0, {}, 0, record.round
        before, self._settled = self._settled, record.committed_s > 0 and not record.section and self._stopped_at is None
        pause = beat - self._beat if self._mark is not None else 0.0
        if before and self._settled:
            self.gaps[self._kind] = max(self.gaps.get(self._kind, 0.0), pause)
        elif record.phase != "setup" and not record.section:
            self._first_s = max(self._first_s, pause)
        self.pause_s = max(self.pause_s, pause)
        if self._mark is None or record.step != self._mark[0]:
            self._step_done(record, now, usual=before and self._settled)
        self._mark, self._beat, self._told, self._kind = mark, beat, False, kind_of(record)
        return True

    def _step_done(self, record: Record, now: float, *, usual: bool) -> None:
        if usual and self._step_at is not None and self._mark is not None and record.step > self._mark[0]:
            took = (now - self._step_at) / (record.step - self._mark[0])
            self.step_s = took if self.step_s == 0 else 0.8 * self.step_s + 0.2 * took
            self._steps += record.step - self._mark[0]
        self._step_at, self.pause_s = now, 0.0

    def _stopped(self, now: float, *, neighbours_run: bool) -> Seen | None:
        if self._stopped_at is None:
            self._stopped_at, self._told = now, False
        bound = max(STOPPED_MIN_S, STOPPED_STEPS * self.step_s)
        if self._told or not neighbours_run or now - self._stopped_at < EARLY * bound:
            return None
        self._told = True
        return Seen(kind="stopped", since=self._stopped_at, text=f"stopped for {now - self._stopped_at:.2f} s")

    def _bound(self, record: Record, *, blocked: bool) -> float:
        """How long this worker may stand still. One that has made steps before has no excuse once a new round's state is in place."""
        kind = kind_of(record)
        longest = self.gaps.get(kind, 0.0) if self._steps >= LEARN_STEPS else self.gap_s
        usual = max(STALLED_MIN_S, STALLED_GAPS * longest, self._first_s if self._steps < LEARN_STEPS else 0.0)
        if record.committed_s > 0:
            return max(usual, DATA_MIN_S) if blocked and kind in ("data", "between") else usual
        return REFORMED * usual if record.restored_s > 0 and self.gap_s > 0 else self.first_step_timeout_s

    def _stalled(self, record: Record, cpu_s: float, now: float, *, between: bool) -> Seen | None:
        pause = now - self._beat
        bound = self._bound(record, blocked=False)
        if self._told or pause < EARLY * bound - 2 * WITNESS_S:
            return None
        if not self._witness:
            self._witness.append((now, cpu_s, ""))
        at, used, _ = self._witness[-1]
        if now - at < WITNESS_S:
            return None
        does = "busy" if cpu_s - used > BUSY * (now - at) else "blocked"
        self._witness.append((now, cpu_s, does))
        if len(self._witness) < 3 or self._witness[-2][2] != does or (between and does == "blocked" and record.entered == record.completed):
            del self._witness[:-2]
            return None
        if pause < EARLY * self._bound(record, blocked=does == "blocked"):
            del self._witness[:-2]
            return None
        self._told = True
        where = "inside a collective" if record.entered > record.completed else f"outside any collective, phase {record.phase}"
        return Seen(kind="stalled", since=self._beat, text=f"no movement for {pause:.2f} s, {does}, {where}")
