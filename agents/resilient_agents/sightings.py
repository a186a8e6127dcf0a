"""Sightings: what a prober and whoever listens to it tell each other.

Contract: frames (wire/frames.py) over a socketpair (the agent's own prober) or over the Unix socket of a `resilient-agent`. An agent says
`Begin` and `Roster` to its own prober; to a daemon it says `Hello`, once, of at most `HELLO_BYTES_MAX`, and need not: a daemon is open to
every user of the node, so nothing of weight hangs on what it is told. A prober says `Started` first, then `Sighted` when there is
something to tell, and `Alive` when there has been nothing for a while.
"""

from __future__ import annotations

from resilient.core.messages import Finding, Msg
from resilient_agents.probe import Roster
from resilient_agents.probes.rules import Mark


class Marks(Msg):
    """What a policy file changes of the numbers by which probes judge (marks.py)."""

    numbers: dict[str, float] = {}  # by the name in probes/limits.py
    marks: dict[str, Mark] = {}  # by the name of the rule


class Begin(Msg):
    """agent -> prober: put these probes to work, those that are at work already stay. The first `Roster` after it starts them."""

    root: str = "/"
    scopes: tuple[str, ...] = ()  # "node", "run"
    only: tuple[str, ...] = ()  # names; () = all that are installed
    without: tuple[str, ...] = ()
    since: float = 0.0  # as in probe.Surroundings, these three
    read: dict[str, int] = {}
    lookback_s: float = 0.0
    marks: Marks = Marks()


class Hello(Msg):
    """agent -> daemon: who is at work here."""

    program: str = ""
    devices: tuple[str, ...] = ()  # of this run's workers, as findings name them; () = not known


class Started(Msg):
    """prober -> all: who looks. Said again when it changes."""

    threads: dict[str, int] = {}  # probe -> its thread, as a crash report of this process names it
    absent: dict[str, str] = {}  # probe -> what there is not on this node for it to look at
    notes: dict[str, str] = {}  # probe -> how it looks, where there are several ways


class Sighted(Msg):
    """prober -> all: what is new."""

    findings: tuple[Finding, ...]


class Alive(Msg):
    """prober -> all: nothing is new."""


Down = Begin | Roster
Up = Started | Sighted | Alive
