"""The command: files in, incidents out; and one verdict for each line of JSON, in order, at once."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

import pytest
from resilient_agents.diagnosis import jsonl, readings

from resilient import cli

DATA = pathlib.Path(__file__).parents[1] / "data"
DMESG = """[733100.000001] usb 1-1: new high-speed USB device number 2 using xhci_hcd
[733102.551931] NVRM: Xid (PCI:0000:1a:00): 79, pid=0, GPU has fallen off the bus.
[733103.551930] NVRM: Xid (PCI:0000:1a:00): 45, pid=4711, name=python, Ch 00000010
"""
TRACE = """step 1200 loss 2.31
[rank3]: Traceback (most recent call last):
[rank3]:   File "/w/train.py", line 10, in <module>
[rank3]:     batch["labels"]
[rank3]: KeyError: 'labels'
step done
"""


def asked(*lines: bytes) -> list[dict]:
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink:
        source.write(b"".join(lines))
        source.seek(0)
        code = jsonl.run(source.fileno(), sink.fileno())
        sink.seek(0)
        return [*map(json.loads, sink), {"code": code}]


def line(text, stream="kmsg", key=1):
    return json.dumps({"id": key, "text": text, "stream": stream}).encode() + b"\n"


def test_each_line_gets_its_answer_in_order():
    answers = asked(
        line("NVRM: Xid (PCI:0000:1a:00): 79, x", key="a"), line("all is well", key="b"), line("CUDA out of memory", "stderr", None)
    )
    assert answers[0] == {
        "id": "a", "is_fault": True, "class": "replace", "layer": "gpu", "kind": "xid", "code": "79", "device": "pci:0000:1a:00",
    }  # fmt: skip
    assert [(it["id"], it["is_fault"], it["class"]) for it in answers[1:3]] == [("b", False, "ignore"), (None, False, "user")]
    assert answers[-1] == {"code": 0}


@pytest.mark.parametrize(
    "bad",
    [
        b"xx\n",
        b'{"id": 1}\n',
        b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "x", "stream": "kmsg"}\n',
        b'{"id":1,"text":"x"}\n',
        b'{"id":1,"text":3,"stream":"kmsg"}\n',
        b'{"id":1,"text":"x","stream":"tape"}\n',
        b"[]\n",
    ],
)
def test_a_bad_line_is_said_with_its_number_and_the_next_one_is_answered(bad):
    first, second, third, end = asked(line("all is well"), bad, line("all is well", key=3))
    assert second["line"] == 2
    assert "expected" in second["error"]
    assert (first["id"], third["id"], end) == (1, 3, {"code": 2})


def test_bytes_that_are_no_text_and_lines_without_an_end_are_read_as_far_as_they_go():
    answers = asked(
        b'{"id":1,"text":"\xff NVRM: Xid (PCI:0000:1a:00): 79, x","stream":"kmsg"}\n', b"\n", line("x" * 5_000_000), line("x").rstrip()
    )
    assert [it.get("is_fault") for it in answers] == [True, False, False, None]


def test_an_answer_comes_before_the_input_ends():
    program = [sys.executable, "-m", "resilient.cli", "diagnose", "--jsonl"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        guard = threading.Timer(30.0, process.kill)
        guard.start()
        for key in range(3):
            process.stdin.write(line("all is well", key=key))
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == key
        process.stdin.close()
        assert process.wait() == 0
        guard.cancel()


def test_logs_of_two_nodes_are_one_incident_with_the_gpu_to_blame(tmp_path, capsys):
    for node, name, text in (
        ("node-1", "dmesg.log", DMESG),
        ("node-2", "rank9.err", "RuntimeError: NCCL communicator was aborted on rank 9.\n"),
    ):
        (tmp_path / node).mkdir()
        (tmp_path / node / name).write_text(text)
    assert cli.main(["diagnose", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 incident(s)" in out
    assert "culprit   pci:0000:1a:00 on node-1" in out
    assert cli.main(["diagnose", "--json", str(tmp_path)]) == 1
    (incident,) = json.loads(capsys.readouterr().out)["incidents"]
    assert (incident["verdict"], incident["cause"]["finding"]["code"]) == ("replace", "79")
    assert dict(incident["consequences"]) == {"nccl-error": 1, "xid": 1}


def test_a_users_traceback_is_the_programs(tmp_path, capsys):
    (tmp_path / "rank3.log").write_text(TRACE)
    assert cli.main(["diagnose", str(tmp_path / "rank3.log")]) == 0
    out = capsys.readouterr().out
    assert "user-exc KeyError, rank:3" in out
    assert "culprit   the program" in out


def test_dumps_of_all_ranks_name_who_did_not_come(tmp_path, capsys):
    for rank in range(3):
        shutil.copy(DATA / "recorder" / f"nccl_trace_rank_{rank}", tmp_path)
    (tmp_path / "rank0.err").write_text("[rank0]:[E ProcessGroupNCCL.cpp:632] [Rank 0] Watchdog caught collective operation timeout: x\n")
    assert cli.main(["diagnose", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "culprit   rank:2" in out
    assert "nccl-timeout x 1" in out


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    (tmp_path / "nccl_trace_rank_0").write_bytes(b"\x80\x02cos\nsystem\n.")
    assert cli.main(["diagnose", str(tmp_path), str(tmp_path / "none")]) == 2
    err = capsys.readouterr().err
    assert "nccl_trace_rank_0: plain values expected in a dump, found os.system" in err
    assert "none: No such file" in err


def test_streams_and_ranks_are_told_by_names_and_first_lines():
    assert readings.stream_of("dmesg.txt", []) == "kmsg"
    assert readings.stream_of("x.log", ["[    1.234567] NVRM: x", "[    1.234568] y"]) == "kmsg"
    assert readings.stream_of("x.log", ["Mar 11 02:41:50 n1 systemd[1]: Started x"]) == "syslog"
    assert readings.stream_of("attempt_0/3/stdout.log", []) == "stdout"
    assert readings.stream_of("x.log", ["step 1 loss 2"]) == "stderr"
    assert [readings.rank_of(it) for it in ("nccl_trace_rank_12", "attempt_0/3/stderr.log", "rank7.log", "train.log")] == [12, 3, 7, None]


def diagnosed(*arguments, **more):
    command = [sys.executable, "-c", "import sys; from resilient import cli; sys.exit(cli.main())", "diagnose", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **more)


def test_a_pipe_is_a_log_too():
    done = diagnosed("--stream", "kmsg", input=DMESG.encode())
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"culprit   pci:0000:1a:00" in done.stdout


def test_in_a_directory_only_files_are_read(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "above").symlink_to("..")
    (tmp_path / "dmesg.log").write_text(DMESG)
    assert cli.main(["diagnose", str(tmp_path)]) == 1
    assert "1 file(s)" in capsys.readouterr().out


def test_what_gzip_packed_is_unpacked_and_what_cannot_be_is_said(tmp_path, capsys):
    (tmp_path / "dmesg.log.gz").write_bytes(gzip.compress(DMESG.encode()))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(os.urandom(4096))[:-100])
    (tmp_path / "dmesg.xz").write_bytes(b"\xfd7zXZ\x00 and more")
    assert cli.main(["diagnose", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "culprit   pci:0000:1a:00" in said.out
    assert "cut.gz: cannot be unpacked to its end" in said.err
    assert "dmesg.xz: a log as it was written, or packed by gzip, expected, one packed by xz found" in said.err


@pytest.mark.parametrize("date", ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "Feb 29 23:59:59"])
def test_no_date_is_too_strange(date, tmp_path):
    xid = "host kernel: NVRM: Xid (PCI:0000:1a:00): 79, x"
    (tmp_path / "syslog").write_text(f"{date} {xid}\nJan  1 00:00:01 {xid}\n2100-03-01T00:00:00Z {xid}\n")
    assert cli.main(["diagnose", str(tmp_path)]) == 1


def test_a_log_does_not_move_the_readers_cursor(tmp_path, capsys):
    (tmp_path / "dmesg").write_text("NVRM: Xid (PCI:0000:1a:00): 79, \x1bPhidden\x08\x07 word\n")
    cli.main(["diagnose", str(tmp_path)])
    assert "79, \\x1bPhidden\\x08\\x07 word" in capsys.readouterr().out


def test_an_open_traceback_of_each_of_many_ranks_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(readings, "OPEN", 1000)
    with (tmp_path / "all.log").open("w") as log:
        for rank in range(100):
            log.write(f"[rank{rank}]: Traceback (most recent call last):\n")
            log.write(f'[rank{rank}]:   File "x"\n[rank{rank}]: KeyError: 1\n')
    assert len(list(readings.sightings(str(tmp_path / "all.log")))) == 100


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_without_an_end_of_the_line_it_says_so(closed):
    command = f'exec "$0" -c "import sys; from resilient import cli; sys.exit(cli.main())" diagnose --jsonl {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable], input=line("x"), capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"resilient: --jsonl: standard input and output expected")


def test_it_does_without_torch():
    program = "import sys; from resilient_agents.diagnosis import command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
