"""The node's daemon: a real one, on a machine that is written for the test; alone, with a run, and killed under a run."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from installed import ROOT, path_with
from launched import Launched
from outside import environment, wait_for
from resilient_agents.sightings import Hello, Sighted, Started, Up

from resilient.core.messages import NONE
from resilient.wire.frames import Decoder, encode

pytestmark = pytest.mark.process
DEPLOY = ROOT / "agents" / "deploy"
FAULT = "NVRM: Xid (PCI:0000:{bus}:00): {code}, pid=1234, name=python, Ch 00000010"
LOST = "NVRM: Xid (PCI:0000:{bus}:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
SCRIPT = """
import pathlib, sys, time
while not (pathlib.Path(sys.argv[1]) / "enough").exists():
    time.sleep(0.02)
"""


class Daemon:
    """One, with a root of its own."""

    def __init__(self, where: pathlib.Path, site: str) -> None:
        self.root = where / "host"
        (self.root / "dev").mkdir(parents=True)
        (self.root / "dev/kmsg").touch()
        self.socket = str(where / "a.sock")
        self.output = where / "daemon.out"
        self.state = where / "state" / "strikes.jsonl"
        places = ["--root", str(self.root), "--socket", self.socket, "--state", str(self.state)]
        self.command = [sys.executable, "-P", "-m", "resilient_agents.daemon", *places]
        self.env = environment(PYTHONPATH=site)
        self.start()

    def start(self) -> None:
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, env=self.env)
        wait_for("the probes are at work", lambda: "kernel-log" in self.rows("started")[-1]["notes"] if self.rows("started") else False)

    def rows(self, event: str) -> list[dict]:
        lines = self.output.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]
        return [row for row in rows if row["event"] == event]

    def say(self, bus: str, line: str = LOST, code: int = 79) -> None:
        with (self.root / "dev/kmsg").open("a") as log:
            log.write(f"4,1,1,-;{line.format(bus=bus, code=code)}\n")

    def listener(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(20)
        line.connect(self.socket)
        return line

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def daemon(tmp_path):
    (tmp_path / "d").mkdir()
    one = Daemon(tmp_path / "d", path_with(tmp_path / "site"))
    yield one
    one.end()


def heard(line: socket.socket, device: str) -> list:
    """All messages until one tells of this device."""
    decoder: Decoder = Decoder(Up)
    messages: list = []
    while not any(isinstance(m, Sighted) and any(f.device == device for f in m.findings) for m in messages):
        data = line.recv(1 << 16)
        assert data, messages
        messages += decoder.feed(data)
    return messages


def test_it_tells_what_is_new_and_newcomers_what_is_the_matter(daemon):
    with daemon.listener() as first, daemon.listener() as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        daemon.say("3b")
        assert isinstance(heard(first, "pci:0000:3b:00")[0], Started)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1 << 16):
                pass  # shut, after what it was told
        with daemon.listener() as second:
            heard(second, "pci:0000:3b:00")
            daemon.say("5e")
            heard(second, "pci:0000:5e:00")
            heard(first, "pci:0000:5e:00")
    rows = wait_for("both are printed", lambda: rows if len(rows := daemon.rows("finding")) == 2 else None)
    assert [(row["kind"], row["code"], row["device"], row["class"]) for row in rows] == [
        ("xid", "79", f"pci:0000:{bus}:00", rows[0]["class"]) for bus in ("3b", "5e")
    ]
    daemon.process.send_signal(signal.SIGUSR1)
    counts = wait_for("counts", lambda: daemon.rows("counts"))[-1]
    assert {"probe": "kernel-log", "kind": "xid", "class": rows[0]["class"], "count": 2} in counts["findings"]
    other = subprocess.run(daemon.command, env=daemon.env, capture_output=True, text=True, check=False)
    assert other.returncode == 2 and f"pid {daemon.process.pid}" in other.stderr
    daemon.process.terminate()
    assert daemon.process.wait(10) == 0
    assert not pathlib.Path(daemon.socket).exists()


def test_a_listener_that_does_not_read_costs_nobody_anything(daemon):
    with daemon.listener() as deaf:
        for i in range(200):
            daemon.say(f"{i:02x}")
        with daemon.listener() as other:
            daemon.say("ff")
            heard(other, "pci:0000:00:00")
        del deaf
    assert daemon.process.poll() is None


def test_a_device_that_three_jobs_struck_is_told_of_and_not_forgotten(daemon):
    def struck() -> list[dict]:
        return [row for row in daemon.rows("finding") if row["kind"] == "device-repeats"]

    for program, code in (("a.py", 13), ("a.py", 69), ("b.py", 31), ("c.py", 43)):
        assert struck() == []
        with daemon.listener() as job, daemon.listener() as other:
            job.sendall(encode(Hello(program=program, devices=("pci:0000:3b:00", "gpu:0"))))
            other.sendall(encode(Hello(program="other.py", devices=("pci:0000:5e:00", "gpu:1"))))
            daemon.say("3b", FAULT, code)
            heard(job, "pci:0000:3b:00")
    wait_for("the device's fault", struck)
    (row,) = struck()
    assert (row["device"], row["class"], row["role"]) == ("pci:0000:3b:00", "cordon", "cause")
    assert all(name in row["text"] for name in ("a.py of user", "b.py", "c.py")) and "other.py" not in row["text"]
    daemon.process.terminate()
    assert daemon.process.wait(10) == 0
    daemon.start()
    wait_for("it is known at once", struck)
    once = subprocess.run([*daemon.command, "--once", "--probes", "clock"], env=daemon.env, capture_output=True, text=True, check=False)
    assert once.returncode == 1 and "device-repeats" in once.stdout
    daemon.end()
    daemon.state.write_bytes(b"\xff not a book")
    daemon.start()
    wait_for("it looks again", lambda: daemon.rows("started"))
    assert struck() == [] and "strikes.jsonl.damaged" in daemon.output.read_text()


def test_once_tells_by_its_exit_code(daemon, tmp_path):
    port = tmp_path / "d/host/sys/class/net/eth0"
    (port / "device").mkdir(parents=True)
    done = subprocess.run(
        [*daemon.command, "--once", "--probes", "ethernet,clock"], env=daemon.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[0])["threads"]) == {"ethernet", "clock"}
    (daemon.root / "dev/kmsg").write_text(f"4,1,1000000,-;{LOST.format(bus='3b')}\n6,2,3600000000,-;a line\n")
    policy = tmp_path / "mine.toml"
    policy.write_text("[probe]\nlookback_s = 60")
    look = [*daemon.command, "--once", "--probes", "kernel-log"]
    codes = [
        subprocess.run([*look, *more], env=daemon.env, capture_output=True, check=False).returncode for more in ([], ["--policy", policy])
    ]
    assert codes == [1, 0], "it looks back two hours, or as far as it is told"
    policy.write_text("[probe]\nflips = 60")
    wrong = subprocess.run([*look, "--policy", policy], env=daemon.env, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "'flips'" in wrong.stderr
    wrong = subprocess.run([*daemon.command, "--probes", "a,no-b"], env=daemon.env, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "'a,no-b' found" in wrong.stderr


def test_a_run_uses_it_and_goes_back_to_its_own_eyes_when_it_is_killed(daemon, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    own = tmp_path / "own"
    (own / "dev").mkdir(parents=True)
    (own / "dev/kmsg").touch()
    flags = ["--nproc-per-node", "1", "--probe-root", str(own), "--probe-socket", daemon.socket]

    def xids(run: Launched) -> list[str]:
        return [row["text"] for row in run.events("finding") if row["kind"] == "xid"]

    def say_to_both(bus: str) -> None:
        daemon.say(bus)
        with (own / "dev/kmsg").open("a") as log:
            log.write(f"4,1,{int(time.monotonic() * 1e6)},-;{LOST.format(bus='0' + bus[1])}\n")

    with Launched(tmp_path, flags, str(script), [str(tmp_path)], env={"PYTHONPATH": path_with(tmp_path / "site")}) as run:
        run.until(lambda: run.events("worker_started"), "it runs")
        say_to_both("3b")
        run.until(lambda: xids(run), "the daemon's finding")
        assert all("3b:00" in text for text in xids(run))  # nobody else looks at the node
        daemon.process.kill()
        run.until(lambda: [row for row in run.events("finding") if row["kind"] == "prober-lost"], "it is missed")
        end = time.monotonic() + 30
        while not any("0b:00" in text for text in xids(run)):
            assert time.monotonic() < end
            say_to_both("4b")
            time.sleep(0.5)
        (tmp_path / "enough").touch()
        assert run.wait() == 0, run.text()
    assert all(row["rank"] == NONE for row in run.events("finding"))


# ------------------------------------------------------------------ how it is installed


def test_the_systemd_unit_is_one(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd here")
    unit = tmp_path / "resilient-agent.service"
    unit.write_text((DEPLOY / "resilient-agent.service").read_text().replace("/usr/local/bin/resilient-agent", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_daemon_set_is_one():
    yaml = pytest.importorskip("yaml")
    namespace, daemons = yaml.safe_load_all((DEPLOY / "daemonset.yaml").read_text())
    spec = daemons["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert daemons["metadata"]["namespace"] == namespace["metadata"]["name"]
    assert daemons["spec"]["selector"]["matchLabels"].items() <= daemons["spec"]["template"]["metadata"]["labels"].items()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert all(mount.get("readOnly") for mount in container["volumeMounts"] if mount["mountPath"].startswith("/host"))
    assert not container["securityContext"]["privileged"] and container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    from resilient_agents.daemon import _parser

    args = _parser().parse_args(container["command"][1:])
    assert args.root == "/host" and args.socket.startswith("/run/resilient/")
