"""Meeting: where the nodes of a run meet, who holds the place, and how they know each other.

Contract: torchrun's rules say who hosts. `--standalone`: this node, on a free port. `static`: the node with `--node-rank 0`, on
`--master-addr:--master-port`. `c10d`: the first process that can listen on the endpoint's port on the machine that the endpoint names
(or the one whose `--rdzv-conf is_host=1` says so). Everybody else connects.
The secret is given (--token-file, RESILIENT_TOKEN), or minted where no other node can come. Only where all nodes are on this machine is
it derived from the run id: that keeps two runs apart, and nobody out. Bound to loopback unless nodes are remote.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from resilient.errors import ConfigError

if TYPE_CHECKING:
    from resilient.config import Options
    from resilient_agents.orders import Launch

LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of the run meet, and whether this one holds the place."""

    run_id: str
    token: str
    host: str  # where the coordinator is reached
    port: int
    listener: socket.socket | None  # bound, if this node hosts
    alone: bool  # no other node can come
    local: bool  # all nodes are on this machine, surely


def meeting_of(launch: Launch, options: Options) -> Meeting:
    """Settle all of it, and take the place if it is ours. Raises ConfigError."""
    alone = launch.nodes_max == 1
    run_id = launch.run_id
    if alone and run_id in {"", "none"}:
        run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    local = alone or _is_loopback(launch.host)
    token = _token(options, run_id, alone=alone, local=local)
    if launch.port == 0 and not alone:
        raise ConfigError("--rdzv-endpoint: a port that all nodes know expected, 0 found")
    entitled, must = (True, True) if alone else _entitled(launch)
    listener: socket.socket | None = None
    if entitled:
        try:
            listener = _bind(LOOPBACK if local else "", launch.port)
        except OSError as error:
            if must:
                raise ConfigError(f"--rdzv-endpoint {launch.host}:{launch.port}: cannot listen there ({error.strerror})") from error
    port = launch.port if listener is None else listener.getsockname()[1]
    host = LOOPBACK if local else launch.host
    return Meeting(run_id, token, host, port, listener, alone=alone, local=local)


def _entitled(launch: Launch) -> tuple[bool, bool]:
    """Whether this node may host the coordinator, and whether it must (torchrun's rules)."""
    if launch.backend == "static":
        return launch.node_rank == 0, launch.node_rank == 0
    said = launch.endpoint_conf.get("is_host")
    if said is not None:
        yes = said.lower() in {"1", "true", "t", "yes", "y"}
        return yes, yes
    return launch.is_here, False


def _token(options: Options, run_id: str, *, alone: bool, local: bool) -> str:
    given = os.environ.get("RESILIENT_TOKEN", "")
    if options.token_file:
        try:
            given = Path(options.token_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"--token-file {options.token_file}: cannot be read ({error.strerror})") from error
    if given:
        return given
    if alone:
        return secrets.token_hex(16)
    if local:  # whoever can connect is on this machine already
        return hashlib.sha256(f"resilient run {run_id}".encode()).hexdigest()
    text = (
        "several nodes need a secret that all of them know: make one with "
        "`python -c 'import secrets; print(secrets.token_hex(16))' > token`, and give it to every node with --token-file token "
        "or in RESILIENT_TOKEN"
    )
    raise ConfigError(text)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    if host:
        return socket.create_server((host, port), backlog=2048)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=2048)
    return socket.create_server(("", port), backlog=2048)


def address(launch: Launch, meeting: Meeting) -> str:
    """How other nodes reach this one."""
    if launch.local_addr:
        return launch.local_addr
    if meeting.local:
        return LOOPBACK
    if meeting.listener is not None:
        return meeting.host
    try:
        family, kind, _, _, there = socket.getaddrinfo(meeting.host, meeting.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing: asks the routing table which of our addresses leads there
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"--rdzv-endpoint {meeting.host}:{meeting.port}: no way leads there ({error.strerror})") from error
