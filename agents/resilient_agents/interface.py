"""Interface: which of this machine's addresses other nodes are to use for bulk.

Think of a delivery address: the office has a front door, but pallets go to the ramp in the back street.

Contract: `address_on` turns what --data-interface names (an interface, an address, a network) into one address that is there, IPv4
first, or raises ConfigError that lists what is there. Link-local addresses are taken only where they are named.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

from resilient.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def present() -> dict[str, list[str]]:
    """The addresses of this machine, by interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {name: [a.address for a in found if a.family in families] for name, found in psutil.net_if_addrs().items()}


def address_on(wanted: str, there: Mapping[str, Sequence[str]]) -> str:
    """The address that `wanted` means. there: interface -> its addresses. Raises ConfigError."""
    if wanted in there:
        matching = [a for a in there[wanted] if not _parsed(a).is_link_local]
    else:
        network = _network(wanted)
        matching = [a for name in sorted(there) for a in there[name] if network is not None and _parsed(a) in network]
    if not matching:
        listed = "; ".join(f"{name} {' '.join(there[name]) or '(no address)'}" for name in sorted(there)) or "none"
        raise ConfigError(
            f"--data-interface {wanted}: the name of an interface, an address or a network of this machine expected; found here: {listed}"
        )
    return min(matching, key=lambda a: _parsed(a).version)  # of equals the first


def _parsed(address: str) -> Address:
    return ipaddress.ip_address(address.partition("%")[0])


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)  # a bare address is a network of one
    except ValueError:
        return None
