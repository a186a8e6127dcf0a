"""Maintenance: a node on which somebody has left a note in /run/maintenance gets no new work."""

from resilient_agents.probe import Surroundings
from resilient_agents.probes import reading

from resilient.core.messages import Finding


class Maintenance:
    """Looks for the note."""

    name, period_s, lasting = "maintenance", 5.0, True

    def __init__(self, surroundings: Surroundings) -> None:
        """Everything of the host is read below the root that is given here."""
        self.path = surroundings.path("/run/maintenance")

    def check(self, now: float) -> list[Finding]:  # noqa: ARG002 - it asks for no time
        """What is the matter now; nothing, once the note is gone."""
        note = reading.text(self.path)
        return [] if note is None else [Finding(seq=0, kind="maintenance", layer="node", class_="cordon", text=note)]
