"""Trace: what happened in a simulated run, in lines that a person can read and a golden file can hold.

Contract: one line per announced event, without times and process ids unless asked for: what stays is what a change of timing must not
change.
"""

from __future__ import annotations

from resilient.core import lines

TAIL = 40


class Trace:
    """All lines of one run."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.lines: list[tuple[float, str]] = []

    def line(self, now: float, line: lines.EventLine) -> None:
        """Something was announced."""
        self.lines.append((now, describe(line)))

    def tail(self) -> str:
        """The end of it, with times."""
        return "\n".join(f"  {now - 1000:9.4f} {text}" for now, text in self.lines[-TAIL:])


def describe(line: lines.EventLine) -> str:
    """One line for people."""
    match line:
        case lines.RunStarted():
            return f"run started: world {line.world_size} on {' '.join(line.nodes)}"
        case lines.WorkerStarted():
            return f"{line.node}: {line.worker} started as {line.role} {line.rank}"
        case lines.StandbyReady():
            return f"{line.node}: {line.worker} is ready for rank {line.shadow}"
        case lines.FindingLine() if line.probe:
            about = " ".join(
                filter(None, (line.kind, line.code, "is over" if line.clears else "", f"on {line.device}" if line.device else ""))
            )
            return f"{line.node}: {line.probe} saw {about} ({line.class_ or 'no class'}): {line.text}"
        case lines.FindingLine():
            return f"{line.node}: finding {line.kind} rank {line.rank}: {line.text}"
        case lines.VerdictLine():
            return f"{line.node}: verdict {line.verdict} on {line.kind} of rank {line.rank}: {line.why}"
        case lines.RoundStarted():
            emptied = f" emptied {list(line.emptied)}" if line.emptied else ""
            return f"round {line.round} ({line.reason}): step {line.step} from {line.tier}{emptied}"
        case lines.CheckpointCommitted():
            return f"checkpoint {line.step} committed"
        case lines.IncidentClosed():
            about = f"{line.cause} of rank {line.rank} on {line.node}, {line.verdict}"
            device = f" ({line.class_} {line.device})" if line.class_ else ""
            return f"incident {line.incident} closed: {about}{device}, state from {line.restored_from}, {line.steps_lost} lost"
        case lines.IncidentExplained():
            return f"incident {line.incident} explained: {line.cause} of rank {line.rank} on {line.node} ({line.class_} {line.device})"
        case lines.NodeCordoned():
            return f"{line.node}: closed for {line.kind} {line.device}".rstrip()
        case lines.NodeOpened():
            return f"{line.node}: open again after {line.kind} {line.device}".rstrip()
        case lines.RunFinished():
            return f"run finished: {line.exit_code} {line.message}".rstrip()
