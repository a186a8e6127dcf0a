"""Prober: the process in which an agent's probes run, so that whatever they call can end, stop or eat that process and nothing else.

Think of a canary in a cage of its own: it goes down first, it is replaced, and nobody else has breathed the same air.

Contract: started as `python -P -m resilient_agents.prober SOCKET AGENT CRASH` (probing.py) and speaks the frames of sightings.py. No
torch. It dies with its agent. CRASH is a file in memory, into which the interpreter writes the stacks when a signal such as SIGSEGV ends
it: the agent reads there whose thread it was. Within `ALIVE_S` it says that it is alive, so that a standstill of the whole process is
noticed, too.
"""

from __future__ import annotations

import faulthandler
import os
import select
import socket
import sys
import time
from typing import TYPE_CHECKING, Final

from resilient.wire.frames import Decoder, encode
from resilient_agents import kernel
from resilient_agents.engine import Engine
from resilient_agents.sightings import Alive, Begin, Down, Sighted, Up

if TYPE_CHECKING:
    from resilient.core.messages import Finding

TICK_S: Final = 1.0  # so often it is looked who hangs: 0.005 % of a core
ALIVE_S: Final = 5.0
NICE: Final = 5  # training goes first; at 19 a full machine would not let it look within seconds
FRAME_FINDINGS_MAX: Final = 200  # of at most 4 KiB each


def main() -> None:
    """Serve one agent until it hangs up."""
    line = socket.socket(fileno=int(sys.argv[1]))
    kernel.die_with(int(sys.argv[2]))
    faulthandler.enable(file=int(sys.argv[3]), all_threads=True)
    os.nice(NICE)
    serve(line, Engine())
    os._exit(0)  # threads that hang are left where they hang


def serve(line: socket.socket, engine: Engine) -> None:
    """Take orders and tell news, until the other side is gone."""
    decoder: Decoder[Down] = Decoder(Down)
    begin: Begin | None = None
    spoke = time.monotonic()
    watched = select.poll()
    for fd in (line.fileno(), engine.fd):
        watched.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in watched.poll(1000 * TICK_S)}
        if line.fileno() in ready:
            try:
                data = line.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            for order in decoder.feed(data):
                if isinstance(order, Begin):
                    begin = order
                    continue
                engine.roster = order
                if begin is not None:
                    engine.start(begin)
                    begin = None
        messages = told(engine)
        if not messages and time.monotonic() - spoke > ALIVE_S - TICK_S:
            messages = [Alive()]
        for message in messages:
            try:
                line.sendall(encode(message))
            except OSError:
                return
            spoke = time.monotonic()


def told(engine: Engine) -> list[Up]:
    """What there is to say now, as frames of a bounded size."""
    started = engine.started()
    news: list[Finding] = engine.news()
    pieces = [tuple(news[i : i + FRAME_FINDINGS_MAX]) for i in range(0, len(news), FRAME_FINDINGS_MAX)]
    first: list[Up] = [] if started is None else [started]
    return first + [Sighted(findings=piece) for piece in pieces]


if __name__ == "__main__":
    main()
