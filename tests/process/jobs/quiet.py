"""Slow in every way that is no hang: a first step of seconds, an evaluation on one rank as long as many steps."""

from __future__ import annotations

import argparse
import pathlib
import time

import torch
from torch import nn

import resilient

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path, required=True)
args = parser.parse_args()

run = resilient.init()
torch.manual_seed(0)
net = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
run.track(model=net, optimizer=opt)
for step in run.steps(30):
    if step == 0:
        time.sleep(7)
    net(torch.ones(2, 4)).sum().backward()
    opt.step()
    opt.zero_grad()
    if step == 20 and run.rank == 0 and run.sound:
        with run.section("eval"):
            time.sleep(8)
    time.sleep(0.02)
