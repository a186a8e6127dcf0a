"""The launcher with scripts that know nothing of us: exit codes, logs, signals, wrong usage, strangers; and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Start
from outside import alive, wait_for

from resilient.core.messages import Join
from resilient.wire.frames import encode

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

SLEEPER = """
import os, signal, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "child" in sys.argv:
    if os.fork() == 0:
        time.sleep(100)
print("up", os.environ["RANK"], flush=True)  # a signal in the middle of a fork may be swallowed by Python's own hooks
time.sleep(100)
"""


def test_a_script_that_ends_well(start: Start, script: Callable[..., Path]) -> None:
    path = script(
        "import os, sys\n"
        "print('hello', os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv[1:])\n"
        "sys.stdout.write('no newline at the end'); sys.stderr.buffer.write(b'\\xff\\xfe broken UTF-8\\n')\n"
    )
    run = start("--standalone", "--nproc-per-node", "2", path, "--lr", "1")
    assert run.wait() == 0
    for rank in range(2):
        assert f"[default{rank}]:hello {rank} 2 ['--lr', '1']\n" in run.output
        assert f"[default{rank}]:no newline at the end\n" in run.output
    assert run.output.count("broken UTF-8") == 2
    (attempt,) = run.run_dir.glob("logs/*_*/attempt_0")
    assert (attempt / "1" / "stdout.log").read_bytes() == b"hello 1 2 ['--lr', '1']\nno newline at the end"
    assert (attempt / "0" / "stderr.log").read_bytes() == b"\xff\xfe broken UTF-8\n"
    assert not (attempt / "0" / "error.json").exists()
    names = [event["event"] for event in run.events()]
    assert names[0] == "run_started"
    assert names.count("worker_started") == 2
    assert names[-1] == "run_finished"
    status = run.status()
    assert status["state"] == "finished"
    assert [row["rank"] for row in status["ranks"]] == [0, 1]
    run.nothing_left()


def test_torchruns_variables(start: Start, script: Callable[..., Path], tmp_path: Path) -> None:
    """The same script under both launchers sees the same variables; only addresses and names of this run differ."""
    path = script(
        "import json, os, sys\n"
        "names = [n for n in os.environ if n.split('_')[0] in "
        "('RANK', 'LOCAL', 'WORLD', 'GROUP', 'ROLE', 'MASTER', 'TORCHELASTIC', 'OMP', 'TORCH')]\n"
        "json.dump({n: os.environ[n] for n in names}, open(sys.argv[1] + os.environ['RANK'], 'w'))\n"
    )
    seen = []
    for module in ("torch.distributed.run", "resilient.run"):
        out = tmp_path / module
        run = start("--standalone", "--nproc-per-node", "2", "--role", "trainer", "--max-restarts", "3", path, out, module=module)
        assert run.wait() == 0, run.output
        seen.append([json.loads(Path(f"{out}{rank}").read_text()) for rank in range(2)])
    theirs, ours = seen
    different = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"}
    for rank in range(2):
        assert set(theirs[rank]) <= set(ours[rank])
        for name in set(theirs[rank]) - different:
            assert (name, ours[rank][name]) == (name, theirs[rank][name])


def test_an_exception_is_the_users(start: Start, script: Callable[..., Path]) -> None:
    path = script("import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('my own fault')\ntime.sleep(100)")
    run = start("--standalone", "--nproc-per-node", "2", path)
    assert run.wait() == 1
    (error_file,) = run.run_dir.glob("logs/*/attempt_0/1/error.json")
    message = json.loads(error_file.read_text())["message"]
    assert message["message"] == "ValueError: my own fault"
    assert "my own fault" in run.output.split("resilient-run: rank 1")[1]
    assert [verdict["verdict"] for verdict in run.events("verdict") if verdict["kind"] == "exit"][0] == "halt"
    assert run.events("run_finished")[0]["exit_code"] == 1
    run.nothing_left()


def test_max_restarts_are_the_users_budget(start: Start, script: Callable[..., Path]) -> None:
    path = script(
        "import os, sys, time\nattempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "print('attempt', attempt, flush=True)\n"
        "if attempt < 2 and os.environ['RANK'] == '0':\n    sys.exit(3)\n"
        "if attempt < 2:\n    time.sleep(100)\n"
    )
    run = start("--standalone", "--nproc-per-node", "2", "--max-restarts", "2", path)
    assert run.wait() == 0, run.output
    assert [len(list(run.run_dir.glob(f"logs/*/attempt_{n}/*/stdout.log"))) for n in range(3)] == [2, 2, 2]
    run.nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_in_order(number: signal.Signals, start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--nproc-per-node", "2", script(SLEEPER), "child")
    run.said("up", 2)
    run.process.send_signal(number)
    assert run.wait(20.0) == 1
    assert run.status()["state"] == "failed"
    run.nothing_left()


def test_who_ignores_the_signal_is_killed_after_the_timeout(start: Start, script: Callable[..., Path]) -> None:
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}  # torchrun has a flag for it since 2.12
    run = start("--standalone", "--nproc-per-node", "2", script(SLEEPER), "stubborn", **patience)
    run.said("up", 2)
    began = time.monotonic()
    run.process.terminate()
    assert run.wait(20.0) == 1
    assert time.monotonic() - began >= 1.0
    run.nothing_left()


def test_a_second_signal_kills_at_once(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--nproc-per-node", "2", script(SLEEPER), "stubborn")
    run.said("up", 2)
    run.process.terminate()
    run.said("a second signal kills")
    run.process.terminate()
    assert run.wait(10.0) == 1
    run.nothing_left()


def test_a_signal_before_anything_is_started(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", script(SLEEPER))
    wait_for("its zygote", run.look)
    run.process.terminate()
    assert run.wait(20.0) != 0
    run.nothing_left()


def test_a_killed_launcher_takes_everything_with_it_and_the_next_one_tidies_up(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--nproc-per-node", "2", script(SLEEPER))
    run.said("up", 2)
    workers = run.pids(2)
    run.process.kill()
    run.wait()
    wait_for("the workers to die", lambda: not any(map(alive, workers)), 5.0)
    left = list(Path("/dev/shm").glob(f"resilient.{run.pid}-*"))
    assert left  # nobody was there to remove it
    second = start("--standalone", script("print('fine')", "second.py"))
    assert second.wait() == 0
    assert not any(path.exists() for path in left)


def test_a_dead_zygote_and_a_dead_store_are_replaced(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--nproc-per-node", "2", script(SLEEPER))
    run.said("up", 2)
    ranks = run.pids(2)
    others = run.look() - set(ranks)
    assert len(others) == 3  # zygote, store and prober
    for pid in others:
        os.kill(pid, signal.SIGKILL)
    wait_for("three new ones", lambda: len(run.look() - set(ranks) - others) >= 3)
    assert run.process.poll() is None
    run.process.terminate()
    run.wait(30.0)
    run.nothing_left()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--no-such-flag", "{script}"], "no-such-flag|required"),
        (["--standalone", "/nowhere/train.py"], r"training script '/nowhere/train\.py' does not exist"),
        (["--standalone", "--nproc-per-node", "none", "{script}"], "none"),
        (["--standalone", "--standbys", "-3", "{script}"], "standbys.*-3"),
        (["--standalone", "--config", "/nowhere.toml", "{script}"], "/nowhere.toml: cannot be read"),
        (["--standalone", "--token-file", "/nowhere.token", "{script}"], "/nowhere.token"),
        (["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "192.0.2.7:29400", "{script}"], "make one with"),
        (["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "{script}"], "a port that all nodes know"),
        (["--standalone", "--log-dir", "{script}", "{script}"], "script.py"),
        (["--standalone", "--data-interface", "eth99", "{script}"], r"--data-interface eth99: .*found here: .*lo 127\.0\.0\.1"),
        (["--standalone", "--data-rate", "5KB", "{script}"], "--data-rate: 0 or at least 1048576 bytes"),
        (["--standalone", "--data-rate", "quick", "{script}"], "bytes expected, such as 500MB or 2GiB, found 'quick'"),
    ],
)
def test_wrong_usage(arguments: list[str], complaint: str, start: Start, script: Callable[..., Path]) -> None:
    path = script("print('must not run')")
    run = start(*(word.format(script=path) for word in arguments))
    assert run.wait(30.0) == 2
    assert re.search(complaint, run.output), run.output
    assert "must not run" not in run.output
    assert "Traceback" not in run.output
    run.nothing_left()


def test_help(start: Start) -> None:
    run = start("--help")
    assert run.wait(30.0) == 0
    for flag in ("--standbys", "--shadows", "--run-dir", "--checkpoint-every", "--nproc-per-node", "--rdzv-endpoint"):
        assert flag in run.output


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def nodes(port: int, *more: str) -> list[str]:
    return ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"localhost:{port}", *more]


def test_two_nodes_on_one_machine(start: Start, script: Callable[..., Path]) -> None:
    path = script("import os\nprint('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], 'group', os.environ['GROUP_RANK'])")
    port = free_port()
    both = [start(*nodes(port, "--nproc-per-node", "2"), path) for _ in range(2)]
    assert [run.wait() for run in both] == [0, 0]
    said = both[0].output + both[1].output
    assert sorted(re.findall(r"rank (\d) of 4 group (\d)", said)) == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")]
    for run in both:
        run.nothing_left()


def test_a_wrong_token_is_said_on_both_sides(start: Start, script: Callable[..., Path]) -> None:
    path = script("")
    port = free_port()
    host = start(*nodes(port), path, RESILIENT_TOKEN="right")
    wait_for("the coordinator's port", lambda: answers(port))
    stranger = start(*nodes(port), path, RESILIENT_TOKEN="wrong")
    assert stranger.wait(30.0) == 1
    assert "wrong token" in stranger.output
    host.said("wrong token")
    assert host.process.poll() is None
    host.process.terminate()
    assert host.wait(20.0) == 1
    for run in (host, stranger):
        run.nothing_left()


def test_garbage_on_every_port_harms_nothing(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--nproc-per-node", "1", script("import time\nprint('up', flush=True)\ntime.sleep(2)\nprint('well')"))
    run.said("up")
    ports = listening_ports({run.pid} | run.look())
    assert ports
    for port in ports:
        for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 100, os.urandom(5000), b""):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.sendall(garbage)
    (door,) = Path("/dev/shm").glob(f"resilient.{run.pid}-*.socket")
    assert door.stat().st_mode & 0o777 == 0o600
    for garbage in (b"\x00" * 64, b"\xff" * 64, encode(Join(worker="n0.1", pid=1, token="guessed"))):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(door))
            stranger.sendall(garbage)
            stranger.settimeout(5)
            assert stranger.recv(100) == b""
    assert run.wait(30.0) == 0, run.output
    assert "well" in run.output
    assert "wrong token" in run.output
    run.nothing_left()


def listening_ports(pids: set[int]) -> set[int]:
    """TCP ports on which these processes listen."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(fd))
            except OSError:
                continue
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            row = line.split()
            if row[3] == "0A" and f"socket:[{row[9]}]" in inodes:
                ports.add(int(row[1].rpartition(":")[2], 16))
    return ports


def test_all_ports_are_loopback_where_all_nodes_are_here(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", script(SLEEPER))
    run.said("up")
    ports = listening_ports({run.pid} | run.look())
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/tcp6").read_text().splitlines()[1:]:
        row = line.split()
        address, _, port = row[1].rpartition(":")
        if row[3] == "0A" and int(port, 16) in ports:
            assert address in ("0100007F", "00000000000000000000000001000000")
    run.process.terminate()
    run.wait()


def test_redirects_tee_and_filters(start: Start, script: Callable[..., Path]) -> None:
    path = script("import os, sys\nprint('out', os.environ['RANK'])\nprint('apple pie', os.environ['RANK'], file=sys.stderr)")
    flags = ["--redirects", "0:1,1:3", "--tee", "0:2,1:2", "--role", "cook", "--duplicate-stderr-filters", "apple"]
    run = start("--standalone", "--nproc-per-node", "2", *flags, path)
    assert run.wait() == 0
    assert "out" not in run.output.replace("out.", "")
    assert "[cook0]:apple pie 0" in run.output
    assert "[cook1]:apple pie 1" in run.output
    (filtered,) = run.run_dir.glob("logs/*/attempt_0/filtered_stderr.log")
    assert sorted(filtered.read_text().splitlines()) == ["[cook0]:apple pie 0", "[cook1]:apple pie 1"]
    only = start("--standalone", "--nproc-per-node", "2", "--local-ranks-filter", "1", path)
    assert only.wait() == 0
    assert "[default1]:out 1" in only.output
    assert "[default0]" not in only.output


def test_much_output_and_a_console_that_does_not_read(start: Start, script: Callable[..., Path], tmp_path: Path) -> None:
    """20 MB of lines: all in the file, the run is not slowed by who reads; one line of 1 MB is shown in parts."""
    path = script("for i in range(200_000):\n    print(i, 'x' * 90)\nprint('y' * 1_000_000)\nprint('end')")
    run = start("--standalone", path, PYTHONUNBUFFERED="")
    assert run.wait(60.0) == 0
    (log,) = run.run_dir.glob("logs/*/attempt_0/0/stdout.log")
    lines = log.read_text().splitlines()
    assert len(lines) == 200_002
    assert run.output.rstrip().endswith("[default0]:end")
    assert "[default0]:199999 x" in run.output


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A file system of one page."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(directory)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_memory_directory_is_a_clear_error(start: Start, script: Callable[..., Path], small_memory: Path) -> None:
    run = start("--standalone", "--nproc-per-node", "2", "--memory-dir", small_memory, script("print('must not run')"))
    assert run.wait(60.0) == 2
    assert f"--memory-dir {small_memory}: at least" in run.output
    assert "must not run" not in run.output
    run.nothing_left()


def test_a_memory_directory_that_is_not_there(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--memory-dir", "/nowhere", script("print('must not run')"))
    assert run.wait(60.0) == 2
    assert "--memory-dir /nowhere: cannot be used" in run.output
    run.nothing_left()


def test_the_root_cause_is_handed_on_to_whoever_supervises_us(start: Start, script: Callable[..., Path], tmp_path: Path) -> None:
    above = tmp_path / "above.json"
    run = start("--standalone", script("raise KeyError('deep down')"), TORCHELASTIC_ERROR_FILE=str(above))
    assert run.wait() == 1
    assert "KeyError: 'deep down'" in json.loads(above.read_text())["message"]["message"]
