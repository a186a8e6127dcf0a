"""Traces: of a Python traceback, the words that tell what happened.

Think of a witness's long account: the frames and the quoted source are the way he took; what he saw he says at the end, and if he says
"because of that" about an earlier sight, the earlier one is what counts.

Contract: `told(lines)` gives the lines that may be judged: those outside of tracebacks, the message of each last exception, and of the
exceptions that were its direct cause. Frames, quoted source, carets, and exceptions that were merely being handled are left out.
"""

from __future__ import annotations

import re
from typing import Final

START: Final = "traceback (most recent call last)"
CAUSE: Final = "the above exception was the direct cause"
CONTEXT: Final = "during handling of the above exception"
_MESSAGE: Final = re.compile(r"[A-Za-z_][\w.]{0,150}(?:$|: |:$)")
NAMED: Final = re.compile(r"\s*(?P<path>(?:[A-Za-z_]\w{0,60}\.){0,8})(?P<code>[A-Za-z_]\w{0,80})(?::|$)")


def told(lines: list[str]) -> list[tuple[str, bool]]:
    """The lines that say something; True for the first line of an exception's message."""
    out: list[tuple[str, bool]] = []
    chain: list[list[str]] = []  # messages of exceptions that still count
    state = "outside"
    link = ""
    for line in lines:
        low = line.lower()
        if START in low:
            if state == "message" and not link and "original traceback" not in low:  # another one, not of this chain
                out += _flat(chain)
                chain = []
            if link == CONTEXT:
                chain = []
            link = ""
            state = "frames"
        elif CAUSE in low or CONTEXT in low:
            link = CAUSE if CAUSE in low else CONTEXT
            state = "between"
        elif state == "frames":
            if line[:1] not in {" ", "\t", ""} and _MESSAGE.match(line):
                chain.append([line])
                state = "message"
        elif state == "message":
            if _foreign(line):
                out += _flat(chain)
                out.append((line, False))
                chain, state = [], "outside"
            elif line.strip():
                chain[-1].append(line)
        elif state == "between" and _MESSAGE.match(line):  # the other one without its frames
            chain = [[line]] if link == CONTEXT else [*chain, [line]]
            state, link = "message", ""
        elif state == "outside":
            out.append((line, False))
    return out + _flat(chain)


def _foreign(line: str) -> bool:
    """Whether a line after a message is somebody else's: a log line with its own stamp."""
    return bool(re.match(r"\[?[EWIF]\d{3,4} |\S{1,64}:\d+:\d+ \[\d+\] ", line))


def _flat(chain: list[list[str]]) -> list[tuple[str, bool]]:
    return [(line, place == 0) for message in chain for place, line in enumerate(message)]
