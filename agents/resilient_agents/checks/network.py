"""Network: whether other nodes would find this one by the name and address it gives them.

Think of the address on your visiting card: is it yours, and does the door open?

Contract: reads only; no other host is asked but through the system's own resolver (which may hang: the deadline tells). A name that
leads to 127.x.x.x is a warning: on one node it does no harm; of several, the others would look for this one on themselves.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import psutil

from resilient_agents.check import Reading, grade

if TYPE_CHECKING:
    from resilient_agents.check import Patient

_CURE: Final = "give /etc/hosts the address other nodes reach, or resilient-run --local-addr"


class Network:
    """This node's name and interfaces."""

    def __init__(self, patient: Patient) -> None:
        """Nothing is asked of it."""
        del patient

    def run(self) -> list[Reading]:
        """Resolve the own name, look at the interfaces, connect to ourselves."""
        name = socket.gethostname()
        try:
            addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
        except OSError as error:
            resolved = Reading(
                what="own name", layer="nic", state="warn", value=f"{name}: {error.strerror}", expected="an address", text=_CURE
            )
            return [resolved, self._interfaces(), _loopback()]
        ours = {found.address.partition("%")[0] for of_one in psutil.net_if_addrs().values() for found in of_one}
        return [own(name, addresses, ours), self._interfaces(), _loopback()]

    @staticmethod
    def _interfaces() -> Reading:
        up = {name: stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"}
        shown = ", ".join(f"{name} {speed} Mb/s" if speed else name for name, speed in sorted(up.items())[:8])
        text = "" if up else "there is no way to other nodes"
        return Reading(
            what="interfaces up", layer="nic", state=grade(warn=not up), value=shown or "none", expected="one or more", text=text
        )


def own(name: str, addresses: Iterable[str], ours: set[str]) -> Reading:
    """What others would make of this node's name. ours: the addresses of its interfaces."""
    parsed = {address: ipaddress.ip_address(address.partition("%")[0]) for address in addresses}
    shown = f"{name} {' '.join(parsed)}"
    if all(address.is_loopback for address in parsed.values()):
        return Reading(what="own name", layer="nic", state="warn", value=shown, expected="an address others reach", text=_CURE)
    strange = [address for address, it in parsed.items() if not it.is_loopback and str(it) not in ours]
    if strange:
        text = f"no interface here has {', '.join(strange)}; {_CURE}"
        return Reading(what="own name", layer="nic", state="warn", value=shown, expected="an address of this node", text=text)
    return Reading(what="own name", layer="nic", value=shown, expected="an address of this node")


def _loopback() -> Reading:
    """A byte to ourselves and back."""
    with socket.socket() as listener, socket.socket() as caller:
        try:
            for it in (listener, caller):
                it.settimeout(2.0)
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            caller.connect(listener.getsockname())
            answerer, _ = listener.accept()
            with answerer:
                answerer.sendall(b"!")
                came = caller.recv(1) == b"!"
        except OSError as error:
            return Reading(
                what="loopback", layer="nic", state="fail", value=error.strerror or str(error), expected="a connection to ourselves"
            )
    return Reading(what="loopback", layer="nic", state=grade(fail=not came), value="connects" if came else "silent", expected="connects")
