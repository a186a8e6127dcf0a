"""From a symptom to its remedy, with the real launcher: something is put where a probe looks, and what comes of it is asked for.

Each fault is injected where it would show on a real machine: a line in the kernel log, a counter in sysfs, an answer of the driver, words
on stderr, a limit of memory, a disk without room. What must hold: the finding is there, the verdict is the right one, who had to move has
moved (and nobody else), and the final weights are bitwise those of a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
import tomllib
from collections.abc import Iterator
from typing import Self

import pytest
from installed import path_with
from launched import Launched, digests
from puppets import Puppets, compiled
from resilient_agents import diagnosis
from test_faults import free_port
from test_recovery import undisturbed

pytestmark = pytest.mark.process

FEATURES = "dropout,sched"
STEPS = 50
LONG = 400  # half a minute, for probes that look every ten seconds
LOST = "NVRM: Xid (PCI:0000:1a:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
PORT = "node-3:2211:2410 [0] transport/net_ib.cc:99 NCCL WARN NET/IB : mlx5_2:1 Got async event : port error"


def job(where: pathlib.Path, *more: str, kind: str = "ddp", steps: int = STEPS) -> list[str]:
    return ["--out", str(where), "--kind", kind, "--features", FEATURES, "--steps", str(steps), "--pause", "0.05", *more]


def machine(where: pathlib.Path) -> pathlib.Path:
    """A node as the probes see it: a kernel log in which nothing was said, and one InfiniBand port that is up."""
    (where / "dev").mkdir(parents=True, exist_ok=True)
    (where / "dev/kmsg").touch()
    port = where / "sys/class/infiniband/mlx5_0/ports/1"
    (port / "counters").mkdir(parents=True)
    for name, text in {"state": "4: ACTIVE", "phys_state": "5: LinkUp", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}.items():
        (port / name).write_text(f"{text}\n")
    (port / "counters/link_downed").write_text("0\n")
    return where


class Pair:
    """Two nodes, each with room for the ranks of the other; `victim` is the one without the coordinator."""

    def __init__(self, where: pathlib.Path, arguments: list[str], *, env: dict[str, dict[str, str]] | None = None) -> None:
        self.where = where
        path = {"PYTHONPATH": path_with(where / "site"), "OMP_NUM_THREADS": "1"}  # as where a node has several ranks: bits depend on it
        meet = ["--nnodes", "2", "--nproc-per-node", "1", "--standbys", "1", "--rdzv-backend", "c10d"]
        meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "pair", "--probe-socket", ""]
        self.roots = {name: machine((where / name).with_suffix(".host")) for name in ("first", "second")}
        self.nodes = {
            name: Launched(
                where,
                [*meet, "--probe-root", str(root)],
                "job.py",
                arguments,
                name=name,
                standalone=False,
                env={**path, **(env or {}).get(name, {})},
            )
            for name, root in self.roots.items()
        }

    def __enter__(self) -> Self:
        for node in self.nodes.values():
            node.__enter__()
        first = next(iter(self.nodes.values()))
        name = first.until(lambda: next((n for n, node in self.nodes.items() if node.events("run_started")), None), "the run to start")
        self.host = self.nodes.pop(name)
        self.victim, self.away = next(iter(self.nodes.items()))
        self.root = self.roots[self.victim]
        self.host.until_standbys(2)
        (self.where / "go").touch()
        self.host.until_step(6)
        return self

    def __exit__(self, *_: object) -> None:
        for node in (self.host, self.away):
            node.__exit__()

    def homes(self) -> dict[int, str]:
        return {row["rank"]: row["node"] for row in self.host.status()["ranks"]}

    def moved(self, kind: str, steps: int = STEPS) -> None:
        """All ranks sit with the coordinator; the other node is closed, because of this."""
        self.host.until(lambda: len(self.homes()) == 2 and len(set(self.homes().values())) == 1, f"the rank to leave for {kind}")
        row = next(row for row in self.host.events("finding") if row["kind"] == kind)
        verdict = next(row for row in self.host.events("verdict") if row["kind"] == kind)
        assert verdict["verdict"] == "evict", (row, verdict)
        (home,) = set(self.homes().values())
        assert row["node"] != home
        assert self.host.wait() == 0, self.host.text()
        (incident,) = self.host.incidents()
        assert incident["cause"] == kind, incident
        assert incident["steps_lost"] == 0, incident
        assert tuple(digests(self.where, 2)) == undisturbed("ddp", FEATURES, world=2, steps=steps)


@contextlib.contextmanager
def alone(where: pathlib.Path, flags: list[str], arguments: list[str], **env: str) -> Iterator[Launched]:
    environment = {"PYTHONPATH": path_with(where / "site"), **env}
    with Launched(
        where, ["--nproc-per-node", "2", "--standbys", "1", "--probe-socket", "", *flags], "job.py", arguments, env=environment
    ) as run:
        yield run


def equal(run: Launched, where: pathlib.Path, *, steps: int = STEPS) -> None:
    assert run.wait() == 0, run.text()
    assert tuple(digests(where, 2)) == undisturbed("ddp", FEATURES, world=2, steps=steps)


def explained(run: Launched) -> str:
    """The cause of the only incident, which a probe may have told of when it was over already."""
    return (run.events("incident_explained") or run.incidents())[-1]["cause"]


def test_a_lost_gpu_in_the_kernel_log_moves_its_rank_to_the_other_node(tmp_path: pathlib.Path) -> None:
    with Pair(tmp_path, job(tmp_path, "--hold", "5")) as pair:
        with (pair.root / "dev/kmsg").open("a") as log:
            log.write(f"4,1201,5140900,-;{LOST}\n")
        pair.moved("xid")


@pytest.mark.long
def test_a_port_that_is_down_in_sysfs_moves_its_rank_to_the_other_node(tmp_path: pathlib.Path) -> None:
    with Pair(tmp_path, job(tmp_path, "--hold", "5", steps=LONG)) as pair:
        (pair.root / "sys/class/infiniband/mlx5_0/ports/1/state").write_text("1: DOWN\n")
        (pair.root / "sys/class/infiniband/mlx5_0/ports/1/phys_state").write_text("2: Polling\n")
        pair.moved("ib-link", LONG)


@pytest.mark.long
def test_a_port_that_flaps_in_sysfs_closes_its_node_to_newcomers(tmp_path: pathlib.Path) -> None:
    with Pair(tmp_path, job(tmp_path, "--hold", "5", steps=LONG)) as pair:
        before = pair.homes()
        (pair.root / "sys/class/infiniband/mlx5_0/ports/1/counters/link_downed").write_text("3\n")
        (row,) = pair.host.until(lambda: pair.host.events("node_cordoned"), "the node to be closed")
        assert (row["kind"], row["verdict"]) == ("ib-flap", "cordon"), row
        assert pair.host.wait() == 0, pair.host.text()
        assert pair.homes() == before
        assert pair.host.incidents() == []
        assert tuple(digests(tmp_path, 2)) == undisturbed("ddp", FEATURES, world=2, steps=LONG)


@pytest.mark.long
def test_what_the_driver_asks_for_moves_its_rank_to_the_other_node(tmp_path: pathlib.Path) -> None:
    library = compiled(tmp_path)
    puppets = {}
    for name in ("first", "second"):
        (tmp_path / f"{name}.gpus").mkdir()
        puppets[name] = Puppets(tmp_path / f"{name}.gpus", library, count=1)
        (tmp_path / f"{name}.host").symlink_to(puppets[name].root)
    env = {name: {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML": str(it.file)} for name, it in puppets.items()}
    with Pair(tmp_path, job(tmp_path, "--hold", "5", steps=LONG), env=env) as pair:
        puppets[pair.victim].set(0, field_230=1)
        pair.moved("recovery-action", LONG)


def test_what_nccl_says_explains_a_death(tmp_path: pathlib.Path) -> None:
    with alone(
        tmp_path, ["--probe-root", str(machine(tmp_path / "host"))], job(tmp_path, "--strike", "1:20:say:forward"), JOB_WORDS=PORT
    ) as run:
        equal(run, tmp_path)
        (incident,) = run.incidents()
        (row,) = [row for row in run.events("finding") if row["kind"] == "nccl-warn"]
        assert (incident["rank"], incident["steps_lost"], row["rank"]) == (1, 0, 1)
        assert explained(run) == "nccl-warn"


@pytest.fixture
def fenced() -> Iterator[pathlib.Path]:
    """A memory cgroup of 1 GiB for one process, of either version; the kernel ends whoever takes more."""
    base = pathlib.Path("/sys/fs/cgroup")
    memory = base / "memory" if (base / "memory/memory.limit_in_bytes").exists() else base
    group = memory / f"resilient-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes")
        limit.write_text(str(1 << 30))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"a memory cgroup of our own needs root and a writable {base}: {error.strerror}")
    yield group
    until = time.monotonic() + 10
    while (group / "cgroup.procs").read_text().split() and time.monotonic() < until:
        time.sleep(0.05)
    group.rmdir()


def test_a_rank_that_the_kernel_ends_for_its_memory(tmp_path: pathlib.Path, fenced: pathlib.Path) -> None:
    if not os.access("/dev/kmsg", os.R_OK):
        pytest.skip("the kernel log of this machine may not be read")
    with alone(tmp_path, [], job(tmp_path, "--strike", "1:20:hog:forward")) as run:
        victim = run.until(lambda: (tmp_path / "struck-1-20-hog-forward").exists() and run.pid(1), "rank 1 to begin")
        (fenced / "cgroup.procs").write_text(str(victim))
        (tmp_path / "fenced-in").touch()
        equal(run, tmp_path)
        (incident,) = run.incidents()
        assert (incident["rank"], incident["steps_lost"]) == (1, 0), (incident, run.events("finding"))
        assert explained(run) == "oom-host"


def test_a_disk_that_is_full_is_told_and_costs_checkpoints_only(tmp_path: pathlib.Path, small: pathlib.Path) -> None:
    with alone(tmp_path, ["--checkpoint", str(small), "--checkpoint-every", "10"], job(tmp_path, "--hold", "5")) as run:
        run.until_standbys(1)
        with contextlib.suppress(OSError), (small / "others").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        (tmp_path / "go").touch()
        row = run.until(lambda: next((r for r in run.events("finding") if r["kind"] == "disk-full"), None), "the full disk to be found")
        assert str(small) in row["text"], row
        equal(run, tmp_path)
        verdicts = [r for r in run.events("verdict") if r["kind"] == "disk-full"]
        assert {r["verdict"] for r in verdicts} == {"watch"}
        assert run.incidents() == []


def test_words_of_a_program_move_nobody(tmp_path: pathlib.Path) -> None:
    """A line that only quotes the kernel, and a user's own error: the rank is replaced once, and its node stays open."""
    words = f'{LOST}\nTraceback (most recent call last):\n  File "train.py", line 2, in <module>\nValueError: Xid 79 in my dictionary'
    with alone(
        tmp_path, ["--probe-root", str(machine(tmp_path / "host"))], job(tmp_path, "--strike", "1:20:say:forward"), JOB_WORDS=words
    ) as run:
        equal(run, tmp_path)
        (incident,) = run.incidents()
        assert (incident["rank"], incident["steps_lost"]) == (1, 0)
        assert not [r for r in run.events("verdict") if r["verdict"] in {"evict", "cordon"}], run.events("verdict")
        assert run.status()["cordoned"] == []


@pytest.mark.long
def test_whatever_a_program_prints_before_it_is_killed_closes_no_node(tmp_path: pathlib.Path) -> None:
    """Every line of the catalogue on stderr, another node with room, and SIGKILL."""
    facts = sorted((pathlib.Path(diagnosis.__file__).parent / "facts").glob("*.toml"))
    words = [row["example"] for file in facts for row in tomllib.loads(file.read_text())["line"] if row.get("example")]
    env = {name: {"JOB_WORDS": "\n".join(words)} for name in ("first", "second")}
    with Pair(tmp_path, job(tmp_path, "--hold", "5", "--strike", "1:20:say:forward"), env=env) as pair:
        assert pair.host.wait() == 0, pair.host.text()
        assert len(pair.host.events("finding")) > 10, "they were read"
        assert pair.host.events("node_cordoned") == []
        assert tuple(digests(tmp_path, 2)) == undisturbed("ddp", FEATURES, world=2, steps=STEPS)
