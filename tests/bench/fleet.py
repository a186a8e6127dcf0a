"""The benchmarks' training under `resilient-run`, on one agent or on several of this machine, each with a memory of its own."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator

import peers
from launched import Launched


class Fleet:
    """Agents and the directories of their memory, while they run."""

    def __init__(self, where: pathlib.Path) -> None:
        self.where = where
        self.jobs: list[Launched] = []
        self.places: list[pathlib.Path] = []

    def wait(self) -> None:
        """Until the training is over."""
        for job in self.jobs:
            assert job.wait(peers.DEADLINE_S) == 0, job.text()

    def times(self) -> list[dict]:
        """What each rank wrote."""
        return [json.loads((self.where / f"times-{rank}.json").read_text()) for rank in range(len(list(self.where.glob("times-*.json"))))]


@contextlib.contextmanager
def started(where: pathlib.Path, ranks: int, nodes: int, arguments: list[str], flags: tuple[str, ...] = ()) -> Iterator[Fleet]:
    """So many ranks on so many nodes."""
    where.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meet = ("--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"localhost:{port}")
    room = pathlib.Path(tempfile.mkdtemp(prefix="bench-", dir="/dev/shm"))
    fleet, env = Fleet(where), {"OMP_NUM_THREADS": str(max(1, peers.THREADS // ranks)), "RESILIENT_SNAPSHOT_EVERY": "auto"}
    fleet.places = [room / f"node{i}" for i in range(nodes)]
    try:
        with contextlib.ExitStack() as stack:
            for i, place in enumerate(fleet.places):
                place.mkdir()
                own = [*(meet if nodes > 1 else ()), *flags, "--nproc-per-node", str(ranks // nodes), "--memory-dir", str(place)]
                job = Launched(where, own, str(peers.JOB), arguments, name=f"node{i}", standalone=nodes == 1, env=env)
                fleet.jobs.append(stack.enter_context(job))
                if i == 0 and nodes > 1:
                    job.until(lambda: _answers(port), "the coordinator's port")
            yield fleet
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
