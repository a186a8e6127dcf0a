"""Instruments: which probes are installed on this node, and which of them are wanted.

Contract: a probe is an entry point of the group `resilient.probes`, ours too; nothing is known of any probe here. `find` gives their names
and how each is made, without importing one: an import may fail, and that is then this probe's own failure. `Choice` is what `--probes`
says.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Final, NamedTuple

from resilient.errors import ConfigError
from resilient_agents.probe import GROUP

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

NOT: Final = "no-"


class Choice(NamedTuple):
    """Which probes are wanted."""

    on: bool = True
    only: tuple[str, ...] = ()  # () = all
    without: tuple[str, ...] = ()

    def wants(self, name: str) -> bool:
        """Whether this one is among them."""
        return self.on and (not self.only or name in self.only) and name not in self.without


ALL: Final = Choice()


def choice(text: str) -> Choice:
    """What `--probes` says: "auto" (all), "off", names (only these), or names with "no-" before them (all but these)."""
    if text in {"auto", "off"}:
        return Choice(on=text == "auto")
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    without = tuple(name.removeprefix(NOT) for name in names if name.startswith(NOT))
    if not names or (without and len(without) != len(names)):
        raise ConfigError(f"--probes: 'auto', 'off', names, or names with 'no-' before each expected, {text!r} found")
    from resilient.config import nearest  # noqa: PLC0415 - not for a prober

    known = find()
    for name in without or names:
        if name not in known:
            near = f"; the nearest one is {nearest(name, known)!r}" if known else ""
            raise ConfigError(f"--probes: no probe {name!r} is installed{near}")
    return Choice(only=() if without else names, without=without)


def find(chosen: Choice = ALL) -> dict[str, Callable[[], Any]]:
    """Name -> what imports it, in the order of the names."""
    points = {point.name: point.load for point in metadata.entry_points(group=GROUP)}
    return {name: points[name] for name in sorted(points) if chosen.wants(name)}
