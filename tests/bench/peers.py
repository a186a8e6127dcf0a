"""The engines of others: which of them are there, and a training that saves by one of them.

dlrover and NVRx live in an environment of their own (`make peers`, or BENCH_PEERS_PYTHON=its interpreter); who is not installed is left
out, and the table says so.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

JOB = pathlib.Path(__file__).parent / "jobs" / "stalled.py"
PYTHON = os.environ.get("BENCH_PEERS_PYTHON") or str(pathlib.Path(__file__).parents[2] / ".venv-peers" / "bin" / "python")
PACKAGES = {"nvrx": "nvidia_resiliency_ext", "dlrover": "dlrover"}
DEADLINE_S = 600
THREADS = os.cpu_count() or 1


def python(engine: str) -> str:
    """The interpreter that can run it, "" if there is none."""
    package = PACKAGES.get(engine.partition("-")[0])
    return sys.executable if package is None else PYTHON if _installed(package) else ""


@functools.cache
def _installed(package: str) -> bool:
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    return os.access(PYTHON, os.X_OK) and subprocess.run([PYTHON, "-c", probe], check=False).returncode == 0


def left_out(engine: str) -> dict[str, object]:
    """Its line of the table."""
    return {"engine": engine, "where": "left out: not installed (make peers)"}


def trained(where: pathlib.Path, engine: str, flags: list[str], ranks: int = 1) -> list[dict]:
    """The training under this engine; for each rank what it wrote."""
    where.mkdir(exist_ok=True)
    common = {**os.environ, "OMP_NUM_THREADS": str(max(1, THREADS // ranks))}
    if ranks > 1:
        common |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    command = [python(engine), str(JOB), engine, str(where), *flags]
    outputs = [where / f"{rank}.out" for rank in range(ranks)]
    running = []
    try:
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with output.open("wb") as file:
                running.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**common, **own}))
        for process, output in zip(running, outputs, strict=True):
            assert process.wait(DEADLINE_S) == 0, output.read_text(errors="replace")
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [json.loads((where / f"times-{rank}.json").read_text()) for rank in range(ranks)]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
