"""A package with checks and probes of somebody else, as they should not be; `installed` lays it out as pip would."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

from resilient_agents.check import Reading
from resilient_agents.checks.matmul import Matmul
from resilient_agents.probe import Absent

from resilient.core.messages import Finding


def installed(directory: Path, checks: dict[str, str], probes: dict[str, str] | None = None) -> str:
    """A directory for PYTHONPATH that registers these classes of this module: entry point -> class."""
    info = directory / "somebody_elses-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody-elses\nVersion: 1.0\n")
    groups = {"resilient.checks": checks, "resilient.probes": probes or {}}
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{name} = ill:{class_}\n" for name, class_ in names.items()) for group, names in groups.items())
    )
    return os.pathsep.join([str(directory), str(Path(__file__).parent)])


class Base:
    def __init__(self, patient) -> None:
        self.patient = patient


class Sound(Base):
    def run(self):
        return [Reading(what="itself", value="sound", expected="sound")]


class Failing(Base):
    def run(self):
        return [Reading(state="fail", value="3 legs", expected="4 legs", layer="furniture", class_="replace", device="dev:table")]


class FailsIfTold(Base):
    """While a file is there; slow, if that says so."""

    def run(self):
        told = Path(os.environ["ILL_FILE"])
        words = told.read_text() if told.exists() else ""
        time.sleep(3.0 if "slow" in words else 0.0)
        return Failing.run(self) if "fail" in words else Sound.run(self)


class Hangs(Base):
    """Takes no signal, and has a child of its own, whose pid it leaves behind."""

    timeout_s = 1.0

    def run(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"])
        Path(os.environ["ILL_PID"]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(1000)


class HangsLong(Hangs):
    timeout_s = 1000.0


class HangsEarly(Base):
    def __init__(self, patient) -> None:
        time.sleep(1000)


class Crashes(Base):
    def run(self):
        print("about to look at address 0")
        ctypes.string_at(0)


class Raises(Base):
    def run(self):
        raise ValueError("no such thing")


class Leaves(Base):
    def run(self):
        os._exit(0)


class NotHere(Base):
    def __init__(self, patient) -> None:
        raise Absent("no such card")


class StopsTheDoctor(Base):
    def run(self):
        os.kill(os.getppid(), signal.SIGSTOP)
        return []


class Sees:
    """A probe."""

    name = "sees"
    period_s = 1.0

    def __init__(self, surroundings) -> None:
        pass

    def check(self, now):
        cause = Finding(
            seq=0, kind="xid", code="79", layer="gpu", device="pci:0000:3b:00", class_="cordon", text="fallen off the bus", probe="sees"
        )
        return [cause, Finding(seq=0, kind="nfs", class_="ignore", role="context", text="x" * 5000)]


class SeesNothing(Sees):
    def check(self, now):
        return []


class CannotSee(Sees):
    def check(self, now):
        raise OSError("no eyes")


class WrongMatmul(Matmul):
    exercise = "ill:wrong"


class FickleMatmul(Matmul):
    exercise = "ill:fickle"


class CrashingExercise(Base):
    torch = True

    def run(self):
        return [Reading(value=str(self.patient.exercise("ill:crash", 30.0)))]


class HangingExercise(Base):
    torch = True

    def run(self):
        return [Reading(value=str(self.patient.exercise("ill:hang", 0.5)))]


class KillsTheGym(Base):
    torch = alone = True

    def run(self):
        return [Reading(value=str(self.patient.exercise("ill:kill_parent", 30.0)))]


class Late(CrashingExercise):
    alone = True


def kill_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


def wrong(device, sizes, repeats, seconds):
    return {dtype: _flipping(lambda count: True, device, dtype, size, repeats, seconds) for dtype, size in sizes.items()}


def fickle(device, sizes, repeats, seconds):
    return {dtype: _flipping(lambda count: count == 3, device, dtype, size, repeats, seconds) for dtype, size in sizes.items()}


def _flipping(when, device, dtype, size, repeats, seconds):
    """One bit, the lowest, of one element."""
    import torch
    from resilient_agents.exercises.matmul import measure

    count = 0

    def product(a, b):
        nonlocal count
        count += 1
        found = a @ b
        if when(count):
            found.view(torch.int32 if dtype == "float32" else torch.int16)[17, 4] ^= 1
        return found

    return measure(product, device, dtype, size, repeats, seconds)


def crash():
    ctypes.string_at(0)


def hang():
    print("half-way")
    time.sleep(1000)
