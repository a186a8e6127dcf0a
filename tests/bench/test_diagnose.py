"""How many lines a second `resilient diagnose --jsonl` answers on one core, end to end, beside a loop that only reads and writes the JSON."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import bound, told

pytestmark = pytest.mark.bench
LINES = 200_000
FAULTS = 0.05
DATA = pathlib.Path(__file__).parents[1] / "data" / "lines" / "sample.jsonl"
PLAIN = """iteration     N/  500000 | consumed samples:      8437760 | elapsed time per iteration (ms): 11820.4 | lm loss: 2.113E+00 | number of nan iterations:   0 |
node-7:88:190 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
[2025-03-11 02:41:50,123] [INFO] [logging.py:96:log_dist] [Rank 0] step=N, skipped=0, lr=[1e-05], mom=[(0.9, 0.95)]
[12345.678901] usb 1-1: new high-speed USB device number 2 using xhci_hcd
systemd[1]: Started Session N of user root.
Mar 11 02:41:50 node-k7 sshd[4711]: Accepted publickey for root from 10.0.0.1 port N ssh2: RSA SHA256:abc
INFO:root:loaded shard N of dataset in 1.2 s, 4096 samples
IPv6: ADDRCONF(NETDEV_CHANGE): ens108np0: link becomes ready
saving checkpoint at iteration    N to /mnt/ckpt in torch_dist format""".splitlines()
ALONE = """
import sys, msgspec
from resilient_agents.diagnosis.jsonl import Answer, Asked
decode, encode = msgspec.json.Decoder(Asked).decode, msgspec.json.Encoder().encode
out = sys.stdout.buffer
for raw in sys.stdin.buffer:
    it = decode(raw)
    out.write(encode(Answer(it.id, False, "ignore", "", "benign", "", "")) + b"\\n")
"""


def lines_file(path: pathlib.Path) -> None:
    seeded = random.Random(1)
    faults = [json.loads(line) for line in DATA.read_text().splitlines()]
    with path.open("w") as file:
        for number in range(LINES):
            if seeded.random() < FAULTS:
                it = seeded.choice(faults)
                text, stream = it["text"], it["stream"]
            else:
                text, stream = seeded.choice(PLAIN).replace("N", str(number), 1), seeded.choice(["kmsg", "syslog", "stdout", "stderr"])
            file.write(json.dumps({"id": number, "text": text, "stream": stream}) + "\n")


def test_lines_a_second(tmp_path):
    lines_file(tmp_path / "lines.jsonl")
    rates: dict[str, list[float]] = {"diagnose": [], "JSON alone": []}
    for _ in range(3):
        for name, program in (("diagnose", ["-m", "resilient.cli", "diagnose", "--jsonl"]), ("JSON alone", ["-c", ALONE])):
            with (tmp_path / "lines.jsonl").open("rb") as source, (tmp_path / "answers").open("wb") as sink:
                begin, wall = os.times(), time.monotonic()
                subprocess.run([sys.executable, *program], stdin=source, stdout=sink, check=True)
                end = os.times()
            cpu = end.children_user + end.children_system - begin.children_user - begin.children_system
            rates[name].append(LINES / cpu)
            print(f"{name}: {LINES / cpu:,.0f} lines a second of CPU, {time.monotonic() - wall:.2f} s")
            assert len((tmp_path / "answers").read_bytes().splitlines()) == LINES
    rows = [{"what": name, "lines_per_s": round(sorted(of)[1]), "min": round(min(of)), "max": round(max(of))} for name, of in rates.items()]
    told("diagnose", rows, bounds=[bound("lines a second on one core", sorted(rates["diagnose"])[1], at_least=50_000)], faults=FAULTS)
