"""The swappable group keeps c10d's contract: every collective, futures, subgroups; a fence frees everybody; a new round serves again."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import torch.distributed as dist

MEMBER = pathlib.Path(__file__).with_name("group_member.py")


def test_every_collective_in_two_rounds() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, str(MEMBER)]
    members = [
        subprocess.Popen([*command, str(r), "3", str(store.port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(3)
    ]
    try:
        for rank, member in enumerate(members):
            out, err = member.communicate(timeout=120)
            lines = out.splitlines()
            assert [line for line in lines if not line.startswith("ok ")] == ["end"], f"rank {rank}: {out}\n{err}"
            assert len(lines) >= 38  # every check of both rounds and of the broken one was reached; before torch 2.13 two fewer
            assert member.returncode == 0, err
    finally:
        for member in members:
            member.kill()
            member.wait()
