"""What lines of text mean: every entry of the catalogue by its own example, the sample lines, forms of every family, and what is no fault."""

from __future__ import annotations

import json
import pathlib

import pytest
from resilient_agents.diagnosis import catalogue, decode
from resilient_agents.diagnosis.page import page
from resilient_agents.diagnosis.text import NOTHING, best, classify, is_fault, pci, relevant

LINES = pathlib.Path(__file__).parents[1] / "data" / "lines"
SAMPLE = [json.loads(line) for line in (LINES / "sample.jsonl").read_text().splitlines()]
FORMS = [line.split("|", 2) for line in (LINES / "forms.txt").read_text().splitlines() if line and not line.startswith("#")]
NODE_FAULTS = {"gpu-reset", "replace", "cordon"}


@pytest.mark.parametrize("it", SAMPLE, ids=lambda it: it["id"])
def test_a_sample_line_means_what_its_label_says(it):
    found = classify(it["text"], it["stream"])
    assert (is_fault(found), found.code, found.device) == (it["is_fault"], it["code"], it["device"])
    assert found.class_ in it["class_ok"]
    if found.kind:
        assert (found.kind, found.layer) == (it["kind"], it["layer"])


def test_forms_of_every_family_have_the_right_class():
    wrong = []
    for stream, classes, raw in FORMS:
        found = classify(raw.replace("\\n", "\n"), stream)
        if found.class_ not in classes.split(","):
            wrong.append((found.class_, classes, found.kind, raw[:100]))
    assert not wrong
    assert len(FORMS) > 300


@pytest.mark.parametrize("entry", catalogue.lines(), ids=lambda it: it.number)
def test_an_entry_is_found_by_its_own_example(entry):
    stream = entry.stream or ("stderr" if entry.where == "user" else "kmsg")
    found = classify(entry.example, stream)
    assert found.kind == entry.kind
    assert entry.by or found.class_ == entry.class_
    assert not entry.by or entry.by in decode.READERS
    assert entry.source


def test_what_the_kernel_is_quoted_to_have_said_proves_nothing():
    line = "NVRM: Xid (PCI:0000:1a:00): 79, pid=0, GPU has fallen off the bus."
    assert classify(line, "kmsg").class_ == "replace"
    assert classify(f"Mar 11 02:41:50 n1 kernel: {line}", "syslog").class_ == "replace"
    for stream, text in (("stdout", line), ("stderr", f"saw: {line}"), ("syslog", f"Mar 11 02:41:50 n1 myapp[7]: {line}")):
        found = classify(text, stream)
        assert (found.kind, found.class_, found.code) == ("quoted", "ignore", "79")


def test_what_a_daemon_is_quoted_to_have_said_proves_nothing():
    line = "rasdaemon[2011]: mc_event: 1 Uncorrected error: memory read error on DIMM_A1 (mc: 5 location: 0:0)"
    assert classify(line, "syslog").class_ == "cordon"
    assert classify("systemd-networkd[811]: ens3f0np0: Lost carrier", "syslog").class_ == "replace"
    for stream in ("stdout", "stderr"):
        assert classify(line, stream).class_ == "ignore"
        assert classify("ixgbe 0000:04:00.0 eth0: NIC Link is Down", stream).class_ == "ignore"


def test_an_unknown_exception_is_the_users_unless_somebody_was_not_there():
    assert classify("mypkg.errors.BadShapeError: 3 != 4", "stderr").class_ == "user"
    assert classify("TimeoutError: the query took too long", "stderr").class_ == "user"
    found = classify("somelib.errors.StorageDisconnectedError: gone", "stderr")
    assert (found.class_, found.kind, found.code) == ("app-restart", "conn", "StorageDisconnectedError")


def test_no_kernel_line_of_the_set_makes_a_node_fault_on_a_workers_output():
    for stream, classes, raw in FORMS:
        if stream == "kmsg" and set(classes.split(",")) <= NODE_FAULTS:
            assert classify(raw.replace("\\n", "\n"), "stdout").class_ not in NODE_FAULTS, raw


def test_a_traceback_is_judged_by_what_it_ends_with():
    quoted = (
        'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    raise RuntimeError("CUDA error: uncorrectable ECC error")\n'
    )
    assert classify(quoted + "KeyError: 'x'", "stderr").class_ == "user"
    assert classify(quoted + "RuntimeError: CUDA error: uncorrectable ECC error encountered", "stderr").class_ == "gpu-reset"
    handled = (
        quoted + "ConnectionResetError: [Errno 104]\n\nDuring handling of the above exception, another exception occurred:\n\n" + quoted
    )
    assert classify(handled + "MyError: bad", "stderr").code == "MyError"
    caused = (
        quoted
        + "RuntimeError: NCCL communicator was aborted on rank 3.\n\nThe above exception was the direct cause of the following exception:\n\n"
    )
    assert classify(caused + quoted + "TrainError: step failed", "stderr").class_ == "app-restart"


def test_tracebacks_of_several_ranks_may_be_interleaved():
    lines = [
        "[rank0]: Traceback (most recent call last):",
        "[rank1]: Traceback (most recent call last):",
        '[rank0]:   File "a.py", line 1, in f',
    ]
    lines += ['[rank1]:   File "a.py", line 1, in f', "[rank0]:     g()", "[rank1]: ValueError: x", "[rank0]: ValueError: x"]
    found = classify("\n".join(lines), "stderr")
    assert (found.class_, found.code, found.device) == ("user", "ValueError", "rank:0")


def test_a_recovery_clears_what_came_before_it_in_the_block():
    down = "nfs: server n7 not responding, timed out"
    assert is_fault(classify(down, "kmsg"))
    found = classify(f"{down}\nnfs: server n7 OK", "kmsg")
    assert found.clears
    assert not is_fault(found)


def test_numbers_that_no_table_has_are_taken_with_care():
    assert classify("NVRM: Xid (PCI:0000:1a:00): 911, pid=1, new", "kmsg").class_ == "app-restart"
    assert classify("NVRM: Xid (PCI:0000:1a:00): 911, Nonfatal thing", "kmsg").class_ == "ignore"
    assert classify("nvidia-nvswitch0: SXid (PCI:0000:85:00.0): 99999, Non-fatal, Link 1 x", "kmsg").class_ == "ignore"
    assert classify("nvidia-nvswitch0: SXid (PCI:0000:85:00.0): 99999, Fatal, Link 1 x", "kmsg").class_ == "gpu-reset"


def test_every_xid_of_the_table_has_its_class_in_every_form():
    for number, row in catalogue.table("xid").items():
        if number == "154" or 144 <= int(number) <= 150:
            continue
        for head in ("(PCI:0000:1a:00)", "(0000:1a:00)", "(PCI:0000:1a:00 GPU-I:05)"):
            for tail in ("pid=7, x", "pid='<unknown>', name=<unknown>, x", "x"):
                found = classify(f"[1.5] NVRM: Xid {head}: {number}, {tail}", "kmsg")
                assert (found.class_, found.code, found.device) == (row["class"], number, "pci:0000:1a:00")


def test_the_nvlink_table_names_the_peer_where_it_is_the_peer():
    rule = decode.nvlink5_rule("149", "(0x025041c6 0x00000000 0x00000000)")
    assert rule is not None
    assert rule["nvidia_investigate"] == "INVESTIGATE_PEER_DEVICE"
    assert decode.nvlink5_rule("149", "no words") is None


@pytest.mark.parametrize(
    "line",
    [
        'audit: type=1701 audit(1.2:3): pid=4 comm="NVRM: Xid (PCI:0000:1a:00): 79" exe="/usr/bin/python3" sig=6 res=1',
        "usb 1-1: Product: NVRM: Xid (PCI:0000:1a:00): 79, pid=1, GPU has fallen off the bus.",
        "usb 1-1: SerialNumber: EXT4-fs error (device sda1): ext4_find_entry: inode #2",
    ],
)
def test_what_the_kernel_only_repeats_proves_nothing(line):
    assert classify(f"[   12.500371] {line}", "kmsg").class_ == "ignore"


def test_pci_addresses_have_one_spelling():
    assert {pci(it) for it in ("00000000:1A:00", "1A:00", "0000:1A:00", "1a:00", "0000:1a:00.0")} == {"0000:1a:00"}


def test_nothing_is_one_object_and_best_of_none_is_nothing():
    assert classify("all is well", "stdout") is NOTHING
    assert classify("", "kmsg") is NOTHING
    assert best([]) is NOTHING
    assert not relevant("all is well")
    assert relevant("NVRM: Xid (PCI:0000:1a:00): 79")


def test_the_page_is_printed_from_the_data():
    page_file = pathlib.Path(__file__).parents[2] / "docs" / "catalogue.md"
    assert page_file.read_text() == page(), "python -m resilient_agents.diagnosis.page > docs/catalogue.md"


def test_a_malformed_entry_is_named():
    for raw in (
        {"kind": "x", "layer": "gpu", "class": "ignore"},
        {"kind": "x", "has": "word", "layer": "gpu", "class": "burn"},
        {"has": "word", "oops": 1},
    ):
        with pytest.raises(ValueError, match="x:1"):
            list(catalogue._read("x.toml", {"line": [raw]}))


KERNEL_COATS = [
    "[733102.551930] {}",
    "[Fri Jul  4 10:29:37 2025] {}",
    "<3>[ 1234.567890][ T4711] {}",
    "6,1234,98765432,-;{}",
    "kern  :err   : 2025-01-21T04:41:44,285060+00:00 {}",
]
SYSLOG_COATS = ["Mar 11 02:41:50 n7 kernel: [733102.551930] {}", "2025-03-11T02:41:50.123456+00:00 n7 kernel: {}", "kernel: {}"]
WORKER_COATS = ["[rank3]: {}", "[default0]:[rank3]:{}", "2025-03-11T02:41:50.123456789Z stderr F {}", "\x1b[31m{}\x1b[0m", "(RayTrainWorker pid=123, ip=10.0.0.1) {}", "[1,3]<stderr>:{}", "2025-03-11 02:41:50,123 {}", "{}\r"]  # fmt: skip


def test_what_logging_puts_around_a_text_does_not_change_what_it_means():
    wrong = []
    for stream, _, raw in FORMS:
        text = raw.replace("\\n", "\n")
        plain = classify(text, stream).class_
        coats = (
            [("kmsg", KERNEL_COATS), ("syslog", SYSLOG_COATS)]
            if stream == "kmsg"
            else [(stream, WORKER_COATS)]
            if stream != "syslog"
            else []
        )
        for as_stream, some in coats:
            for coat in some:
                wrapped = "\n".join(coat.replace("{}", line) for line in text.split("\n"))
                if classify(wrapped, as_stream).class_ != plain:
                    wrong.append((coat, plain, raw[:80]))
    assert not wrong


@pytest.mark.parametrize("number", [23, 79, 507046, 507054, 207001, 107003])
@pytest.mark.parametrize(
    "text", ["step {} loss 2.31", "{}/1000000 [00:10<00:00]", "iter {}: tokens 1e9", "eval result {}", "loss error={}"]
)
def test_a_number_alone_is_no_vendors_code(text, number):
    assert classify(text.format(number), "stdout").class_ == "ignore"
