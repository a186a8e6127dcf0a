"""The command: files in, incidents out; and one verdict for each line of JSON, in order, at once."""

from __future__ import annotations

import json
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


def test_it_does_without_torch():
    program = "import sys; from resilient_agents.diagnosis import command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
