"""Kills the process in which it is loaded, at a named stage of a checkpoint: with SIGKILL, just before what that stage begins with.

Python loads this by itself from PYTHONPATH. What is to be done stands in CHAOS_KILL, lines of "role stage number": the number-th time
that a process of that role comes to that stage it writes a line to the file CHAOS_TOLD, which keeps it from happening again, and dies.

Roles: `agent` (the process that is agent and vault, and coordinator too where there is one node), `rank-N`. Stages of files are seen by
Python's audit events, so nothing of the code under test is named here but files; those in memory by the two calls that bound a write.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.abc
import importlib.util
import os
import re
import signal
import sys
import threading
import time
from typing import Any

FILES = {  # stage: audit event, file
    "persist: a rank file begins": ("open", r"step-\d+/rank-\d+\.distcp\.\w+\.part$"),
    "persist: a rank file is renamed": ("os.rename", r"step-\d+/rank-\d+\.distcp$"),
    "persist: a rank file is there": ("os.remove", r"step-\d+/rank-\d+\.distcp\.\w+\.part$"),
    "commit: the index begins": ("open", r"step-\d+/\.metadata\.\w+\.part$"),
    "commit: the index is renamed": ("os.rename", r"step-\d+/\.metadata$"),
    "commit: the marker begins": ("open", r"step-\d+/COMMIT\.json\.\w+\.part$"),
    "commit: the marker is renamed": ("os.rename", r"step-\d+/COMMIT\.json$"),
    "commit: the marker is there": ("os.remove", r"step-\d+/COMMIT\.json\.\w+\.part$"),
    "prune: the marker goes": ("os.remove", r"step-\d+/COMMIT\.json$"),
    "prune: the files go": ("shutil.rmtree", r"step-\d+$"),
    "prune: the directory goes": ("os.rmdir", r"step-\d+$"),
    "claim: the mark is renamed": ("os.rename", r"IN-USE\.json$"),
    "memory: a segment begins": ("open", r"resilient\..*\.(own|slot-\d)\.new$"),
    "memory: a segment is renamed": ("os.rename", r"resilient\..*\.(own|slot-\d)$"),
}
_wanted = [line.rsplit(" ", 1) for line in os.environ.get("CHAOS_KILL", "").splitlines()]
_seen: collections.Counter[str] = collections.Counter()
_watched = {stage: (event, re.compile(file)) for stage, (event, file) in FILES.items() if any(stage in row[0] for row in _wanted)}


def role() -> str:
    if any("resilient.run" in word or "resilient-run" in word for word in sys.orig_argv):
        return "agent"
    return f"rank-{os.environ.get('RANK', '')}"


def reached(stage: str) -> None:
    """This process is about to do it."""
    name = f"{role()} {stage}"
    _seen[name] += 1
    told = os.environ["CHAOS_TOLD"]
    for wanted, number in _wanted:
        if wanted == name and _seen[name] >= int(number):
            line = f"{name} {number}"
            before = ""
            with contextlib.suppress(FileNotFoundError), open(told, encoding="utf-8") as file:
                before = file.read()
            if line not in before.splitlines():
                with open(told, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
                os.kill(os.getpid(), signal.SIGKILL)


def audited(event: str, arguments: tuple[Any, ...]) -> None:
    for stage, (wanted, file) in _watched.items():
        if event == wanted and file.search(os.fsdecode(arguments[1 if event == "os.rename" else 0]) if _is_path(arguments[0]) else ""):
            reached(stage)


def _is_path(thing: Any) -> bool:
    return isinstance(thing, (str, bytes, os.PathLike))


def snapshots(module: Any) -> None:
    """Both ends of a write into a slot; with a payload it is a snapshot, without one own state."""
    begin, seal = module.Slot.begin, module.Slot.seal
    writing: dict[int, str] = {}

    @functools.wraps(begin)
    def begin_(self: Any, **words: Any) -> Any:
        writing[id(self)] = what = "snapshot" if words["payload_bytes"] else "own state"
        view = begin(self, **words)
        reached(f"{what}: the old seal is broken")
        return view

    @functools.wraps(seal)
    def seal_(self: Any, step: int) -> None:
        what = writing.pop(id(self), "own state")
        reached(f"{what}: all is copied")
        seal(self, step)
        reached(f"{what}: it is sealed")

    module.Slot.begin, module.Slot.seal = begin_, seal_


def copies(module: Any) -> None:
    """A copy for another node: before it goes, while it goes, when it has arrived."""
    put = module.Peer.put

    @functools.wraps(put)
    async def put_(self: Any, key: Any, sealed: Any) -> None:
        what = f"replicate {'snapshot' if key.kind == 'snapshot' else 'own state'}"
        reached(f"{what}: it goes")
        timer = threading.Timer(0.0005, reached, (f"{what}: it is on its way",))
        timer.daemon = True
        timer.start()
        await put(self, key, sealed)
        timer.cancel()
        reached(f"{what}: it has arrived")

    module.Peer.put = put_


CALLS = {"resilient.checkpoint.slot": snapshots, "resilient.checkpoint.peer": copies}


class Finder(importlib.abc.MetaPathFinder):
    """Lets those modules be loaded as ever, and adds to them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in CALLS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                CALLS[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _wanted:
    sys.meta_path.insert(0, Finder())
    if _watched:
        sys.addaudithook(audited)

if "CHAOS_CLOCK" in os.environ:  # after so many seconds the clock on the wall is set back by an hour; 0 = it has been before the begin
    _begin, _real, _after = time.monotonic(), time.time, float(os.environ["CHAOS_CLOCK"])
    time.time = lambda: _real() - 3600 * (time.monotonic() - _begin >= _after)
