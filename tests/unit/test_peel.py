"""What logging puts around a text, and what is learned when it is taken off."""

from __future__ import annotations

import pytest
from resilient_agents.diagnosis.peel import peel, plain

TEXT = "NVRM: Xid (PCI:0000:1a:00): 79"


@pytest.mark.parametrize(
    ("before", "tag", "rank"),
    [
        ("[733102.551930] ", "", ""),
        ("[    1.500371] ", "", ""),
        ("[  +0.000001] ", "", ""),
        ("[Fri Jul  4 10:29:37 2025] ", "", ""),
        ("<3>[ 1234.567890][ T4711] ", "", ""),
        ("6,1234,98765432,-;", "kernel", ""),
        ("kern  :err   : 2025-01-21T04:41:44,285060+00:00 ", "kernel", ""),
        ("kern  :err   : [  123.456789] ", "kernel", ""),
        ("Mar 11 02:41:50 node-k7 kernel: [733102.551930] ", "kernel", ""),
        ("Mar  1 02:41:50 node-k7 nv-fabricmanager[4188]: ", "nv-fabricmanager", ""),
        ("2025-03-11T02:41:50.123456+00:00 node-k7 kernel: ", "kernel", ""),
        ("2025-03-11T02:41:50.123456789Z stderr F ", "", ""),
        ("[rank3]: ", "", "3"),
        ("[default0]:[rank12]:", "", "12"),
        ("[1,3]<stderr>:", "", ""),
        ("\x1b[31m[rank3]:\x1b[0m ", "", "3"),
        ("(RayTrainWorker pid=123, ip=10.0.0.1) ", "", ""),
        ("12: ", "", ""),
    ],
)
def test_layers_come_off(before, tag, rank):
    found = peel(plain(before + TEXT))
    assert (found.text, found.tag, found.rank) == (TEXT, tag, rank)


def test_times_are_told_by_the_clock_they_are_of():
    assert peel("[733102.5] nothing").t is None  # two digits and more stand behind the kernel's point
    boot = peel("[733102.551930] x")
    assert (boot.t, boot.wall) == (733102.55193, False)
    assert peel("6,1,98765432,-;x").t == 98.765432
    dated = peel("[Fri Jul  4 10:29:37 2025] x")
    iso = peel("2025-07-04T10:29:37.5+00:00 host kernel: x")
    assert dated.wall
    assert iso.t == dated.t + 0.5
    assert peel("2025-07-04T12:29:37+02:00 host kernel: x").t == dated.t
    assert peel("Feb 31 10:29:37 host kernel: x").t is None  # no such day


def test_a_program_that_crashed_has_not_said_so_itself():
    found = peel("python[48213]: segfault at 10 ip 0 sp 0 error 4 in libnccl.so.2")
    assert found.tag == ""
    assert found.text.startswith("python[48213]")


def test_a_carriage_return_leaves_what_a_terminal_shows():
    assert plain("10%\r20%\rdone\r\nnext") == "done\nnext"
