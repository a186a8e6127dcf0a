"""Logs: where files lie, and what of them is shown."""

from __future__ import annotations

import os

import pytest
from resilient_agents.logs import LINE_BYTES_MAX, Archive, Console, Files
from resilient_agents.orders import Launch, Program


def launch(**changed) -> Launch:
    values = {
        "program": Program(kind="script", target="x.py"),
        "nodes_min": 1,
        "nodes_max": 1,
        "slots": 2,
        "run_id": "r",
        "standalone": True,
        "backend": "c10d",
        "host": "localhost",
        "port": 0,
        "is_here": True,
        "endpoint_conf": {},
        "node_rank": 0,
        "local_addr": "",
        "role": "default",
        "max_restarts": 0,
        "log_dir": "",
        "redirects": (0, 0),
        "tee": (0, 0),
        "local_ranks_shown": (),
        "stdout_filters": (),
        "stderr_filters": (),
        "prefix_template": "",
        "signals": (),
        "shutdown_timeout_s": 30.0,
        "virtual_local_rank": False,
        "numa_binding": "",
        "ours": {},
        "config": "",
    }
    return Launch(**{**values, **changed})


@pytest.fixture
def archive(tmp_path) -> Archive:
    return Archive(str(tmp_path / "logs"), "r")


def test_files_lie_as_torchrun_lays_them(archive, tmp_path):
    where = [
        archive.files(attempt, local_rank, role).path("stdout.log")
        for attempt, local_rank, role in [(0, 0, "rank"), (0, 1, "rank"), (0, 1, "standby"), (1, 0, "rank"), (1, 0, "rank")]
    ]
    (root,) = (tmp_path / "logs").iterdir()
    assert root.name.startswith("r_")
    names = [os.path.relpath(path, root) for path in where]
    assert names == [
        "attempt_0/0/stdout.log",
        "attempt_0/1/stdout.log",
        "attempt_0/standby_1/stdout.log",
        "attempt_1/0/stdout.log",
        "attempt_1/standby_2/stdout.log",
    ]


def test_dev_null_means_no_files():
    files = Archive(os.devnull, "r").files(0, 0, "rank")
    assert files.path("stdout.log") == ""


def shown(archive: Archive, given: Launch, capfd, write) -> tuple[str, str]:
    """What the console showed in the end."""
    console = Console(given, archive)
    console.start()
    write(console)
    console.close(10.0)
    captured = capfd.readouterr()
    return captured.out, captured.err


def add(files: Files, name: str, data: bytes) -> None:
    with open(files.path(name), "ab") as file:
        file.write(data)


def test_lines_are_shown_whole_behind_their_prefix(archive, capfd):
    def write(console: Console) -> None:
        for local_rank in range(2):
            files = archive.files(0, local_rank, "rank")
            add(files, "stdout.log", b"one\ntw")
            console.follow(f"w{local_rank}", files, 4 + local_rank, local_rank, from_now=False)
            add(files, "stdout.log", b"o\n\nlast")
            add(files, "stderr.log", b"\xff\xfe\n")
            console.ended(f"w{local_rank}")

    out, _ = shown(archive, launch(), capfd, write)
    for local_rank in range(2):
        mine = [line for line in out.splitlines() if line.startswith(f"[default{local_rank}]:")]
        assert mine == [f"[default{local_rank}]:{text}" for text in ("one", "two", "", "last")]


def test_a_standby_is_shown_from_when_it_takes_a_chair(archive, capfd):
    def write(console: Console) -> None:
        files = archive.files(0, 1, "standby")
        add(files, "stdout.log", b"loopback\n")
        console.follow("w", files, 1, 1, from_now=True)
        console.follow("w", files, 1, 1, from_now=True)  # told again in the next round
        add(files, "stdout.log", b"for real\n")

    out, _ = shown(archive, launch(), capfd, write)
    assert out == "[default1]:for real\n"


@pytest.mark.parametrize(
    ("changed", "out", "err"),
    [
        ({}, "[default0]:o\n", "[default0]:e\n"),
        ({"redirects": (1, 0)}, "", "[default0]:e\n"),
        ({"redirects": (3, 0)}, "", ""),
        ({"redirects": (3, 0), "tee": (1, 0)}, "[default0]:o\n", ""),
        ({"local_ranks_shown": (1,)}, "", ""),
        ({"role": "trainer", "prefix_template": "${role_name}/${rank}/${local_rank} "}, "trainer/5/0 o\n", "trainer/5/0 e\n"),
    ],
)
def test_torchruns_flags(changed, out, err, archive, capfd):
    def write(console: Console) -> None:
        files = archive.files(0, 0, "rank")
        add(files, "stdout.log", b"o\n")
        add(files, "stderr.log", b"e\n")
        console.follow("w", files, 5, 0, from_now=False)

    assert shown(archive, launch(**changed), capfd, write) == (out, err)


def test_a_line_without_end_is_shown_in_parts_and_held_in_bounds(archive, capfd):
    def write(console: Console) -> None:
        files = archive.files(0, 0, "rank")
        add(files, "stdout.log", b"x" * (3 * LINE_BYTES_MAX + 5))
        console.follow("w", files, 0, 0, from_now=False)

    out, _ = shown(archive, launch(), capfd, write)
    assert out.count("x") == 3 * LINE_BYTES_MAX + 5
    assert out.count("\n") == 4


def test_a_pipe_whose_reader_has_gone_stops_the_showing_and_nothing_else(archive):
    """In a process of its own: the console writes to descriptor 1."""
    child = os.fork()
    if child == 0:
        read_end, write_end = os.pipe()
        os.close(read_end)
        os.dup2(write_end, 1)
        files = archive.files(0, 0, "rank")
        add(files, "stdout.log", b"nobody reads this\n" * 100)
        console = Console(launch(), archive)
        console.start()
        console.follow("w", files, 0, 0, from_now=False)
        console.close(10.0)
        os._exit(0 if not console._thread.is_alive() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
