"""GPUs of a text file: NVIDIA's library as tests/data/nvml/fake_nvml.c, found and called by pynvml as the real one is.

Think of the strings of the puppets: `Puppets` holds what every GPU shows and writes it into the file at each change; `Watcher` is a
process of its own whose dynamic loader finds the stand-in, and which lets one probe look when it is told to, at a time it is told.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "data" / "nvml" / "fake_nvml.c"
LINKS = 18
COMPILER = shutil.which(os.environ.get("CC", "cc"))

HEALTHY = {
    # an H100's: counters that stand still, links that are up, capped by its power, and a few errors that were corrected
    **{f"field.{number}": 0 for number in (4, 6, 29, 30, 31, 94, 95, 142, 143, 144, 145, 161, 162, 163, 169, 173, 179, 180, 230, 231)},
    "field.3": 2,
    "field.5": 7,
    "field.82": 61,
    **{f"link.{link}": 1 for link in range(LINKS)},
    "pcie.width": 16,
    "pcie.width.max": 16,
    "pcie.generation": 5,
    "pcie.generation.max": 5,
    "utilization": 97,
    "reasons": 0x4,
    "temperature": 58,
    "threshold.0": 95,
    "threshold.1": 92,
    "threshold.2": 105,
    "sram.uncorrected": 0,
    "sram.exceeded": 0,
    "fabric.state": 3,
    "fabric.status": 0,
    "fabric.mask": 0b01_01_00_0001_10_10_10_10,
    "persistence": 1,
}


def compiled(directory: Path) -> Path:
    """The stand-in, built into this directory; skips where there is no compiler."""
    if COMPILER is None:
        pytest.skip("needs a C compiler (cc, or $CC) to build the stand-in for NVIDIA's library")
    library = directory / "libnvidia-ml.so.1"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([COMPILER, *flags, "-o", str(library), str(SOURCE)], check=True)
    return library


def address(index: int) -> str:
    """Where a GPU of these sits, as findings spell it."""
    return f"0000:{0x1A + 0x10 * index:02x}:00"


def device(index: int) -> str:
    """The same, as a finding names it."""
    return f"pci:{address(index)},gpu:{index}"


class Puppets:
    """Eight GPUs, and the little that the kernel shows of them (`root`)."""

    def __init__(self, directory: Path, library: Path, count: int = 8) -> None:
        self.file = directory / "gpus.txt"
        self.library = library
        self.root = directory / "root"
        self.count = count
        self.lines: dict[str, object] = {"count": count, "nvmlSystemGetDriverVersion": "580.65.06"}
        for key, value in HEALTHY.items():
            self.lines[f"*.{key}"] = value
        for index in range(count):
            self.lines[f"{index}.pci"] = f"0000{address(index).upper()}.0"
            self.lines[f"{index}.uuid"] = f"GPU-{index:08x}-0000-0000-0000-000000000000"
            self._kernel(index)
        self.write()

    def _kernel(self, index: int) -> None:
        name = f"{address(index)}.0"
        pci, proc, dev = (self.root / part for part in (f"sys/bus/pci/devices/{name}", f"proc/driver/nvidia/gpus/{name}", "dev"))
        for directory in (pci, proc, dev):
            directory.mkdir(parents=True, exist_ok=True)
        (pci / "vendor").write_text("0x10de\n")
        (pci / "class").write_text("0x030200\n")
        (proc / "information").write_text(
            f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t {100 + index}\nBus Location: \t {name}\nDevice Minor: \t {index}\nGPU Excluded:\t No\n"
        )
        (dev / f"nvidia{index}").touch()

    def set(self, gpu: int | str, **values: object) -> None:
        """What a GPU shows from now on; `field_4` stands for field.4, None for "not supported"."""
        for key, value in values.items():
            name = f"{gpu}.{key.replace('_', '.')}" if gpu != "" else key.replace("_", ".")
            self.lines.pop(name, None)
            if value is not None:
                self.lines[name] = value
        self.write()

    def drop(self, prefix: str) -> None:
        """No line that begins so."""
        self.lines = {key: value for key, value in self.lines.items() if not key.startswith(prefix)}
        self.write()

    def write(self) -> None:
        """Replace the file whole."""
        new = self.file.with_suffix(".new")
        new.write_text("".join(f"{key} {value}\n" for key, value in self.lines.items()))
        new.replace(self.file)


LOOKER = """
import importlib, json, sys, time, types
from importlib import metadata
from resilient_agents.probe import Absent, Roster, Surroundings, Watched
from resilient.core.messages import Finding
import msgspec
roster = [Roster()]
probes = {}
for line in sys.stdin:
    what = json.loads(line)
    if "workers" in what:
        roster[0] = Roster(workers=tuple(Watched(worker=f"w{n}", pid=pid) for n, pid in enumerate(what["workers"])))
        continue
    kind, root = what["kind"], what["root"]
    if what.get("anew"):
        probes.pop(kind, None)
    try:
        if kind not in probes:
            module, name = kind.split(":")
            probes[kind] = getattr(importlib.import_module(module), name)(Surroundings(root, lambda: roster[0]))
        probe = probes[kind]
        began = time.process_time()
        found = []
        for now in what["times"]:
            found = probe.check(now)
        cpu = time.process_time() - began
        answer = {"found": msgspec.to_builtins(found), "cpu_s": cpu}
    except Absent as error:
        answer = {"absent": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Watcher:
    """A process in which probes look at the puppets."""

    def __init__(self, puppets: Puppets, entries: dict[str, str], **env: str) -> None:
        self.root = str(puppets.root)
        self.entries = entries
        paths = {"LD_LIBRARY_PATH": str(puppets.library.parent), "FAKE_NVML": str(puppets.file)}
        path = os.pathsep.join([str(ROOT), str(ROOT / "agents")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **paths, "PYTHONPATH": path, **env},
        )

    def send(self, **what: object) -> None:
        """One line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def ask(self, name: str, *times: float, anew: bool = False) -> dict:
        """Let the probe look at these times; what it said at the last. anew: one that has seen nothing yet."""
        assert self.process.stdout is not None
        self.send(kind=self.entries[name], root=self.root, times=times or (0.0,), anew=anew)
        return json.loads(self.process.stdout.readline())

    def look(self, name: str, *times: float, anew: bool = False) -> list[dict]:
        """The findings of the last look."""
        return self.ask(name, *times, anew=anew)["found"]

    def end(self) -> None:
        """End it, whatever it is at."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def entries() -> dict[str, str]:
    """The probes of the project, as its pyproject.toml registers them."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["entry-points"]["resilient.probes"]
