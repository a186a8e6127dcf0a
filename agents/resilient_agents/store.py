"""Store: the process that hosts torch's TCPStore, so that neither rank 0 nor the agent does.

Contract: it holds no state worth keeping. It tells the agent the port of each store (`StoreOpen`), goes on to the next, empty one when
asked to (`StoreTurn`: a script that is restarted whole must not find the keys of its dead predecessor, for torch puts no attempt in
front of them), and ends with its agent. Bound to loopback unless other nodes must reach it: TCPStore itself asks nobody for a token.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from torch.distributed import TCPStore  # this module is imported in the forked child only

from resilient.wire.link import AgentLine
from resilient_agents.orders import StoreOpen, StoreTurn

HOST_ENV: Final = "RESILIENT_STORE_HOST"  # "127.0.0.1", or "" = all interfaces


def run() -> None:
    """Host stores until the agent hangs up: the one in use, and the next one, so that a turn takes no time."""
    line = AgentLine.connect(os.environ["RESILIENT_SOCKET"], kind=StoreTurn)
    stores = [_open(line), _open(line)]
    while not line.closed:
        if line.recv() is not None:
            del stores[0]
            stores.append(_open(line))
    os._exit(0)


def _open(line: AgentLine) -> TCPStore:
    listener = _listener(os.environ[HOST_ENV])
    port = listener.getsockname()[1]
    store = TCPStore("localhost", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    line.send(StoreOpen(worker=os.environ["RESILIENT_WORKER"], token=os.environ["RESILIENT_TOKEN"], port=port))
    return store


def _listener(host: str) -> socket.socket:
    """A listening socket on a free port, on loopback alone where that is asked for."""
    if host:
        return socket.create_server((host, 0), backlog=2048)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=2048)
    return socket.create_server(("", 0), backlog=2048)
