"""Jsonl: one object in, one verdict out, as fast as a core can.

Think of a turnstile: each ticket is looked at for a moment, in order; a torn one is set aside with a word about which it was, and the
queue moves on; when nobody is waiting, whoever has passed is let out at once.

Contract: reads lines {"id", "text", "stream"}; writes {"id", "is_fault", "class", "layer", "kind", "code", "device"} for each, in order,
and flushes when input pauses. A line that is no such object becomes {"id": null, "line": N, "error": ...} in its place and makes the exit
code 2. Bytes that are no UTF-8 are replaced. A line longer than LONGEST is not kept: it is an error, too.
Numbers: 50,000 lines a second on one core, mostly unremarkable ones (tests/bench/test_diagnose.py says what this machine does).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import msgspec

from resilient_agents.diagnosis.text import NOT_FAULTS, NOTHING, classify

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK: Final = 1 << 20
LONGEST: Final = 64 << 20
STREAMS: Final = frozenset({"kmsg", "syslog", "stdout", "stderr"})


class Asked(msgspec.Struct):
    """One line of input."""

    id: Any
    text: str
    stream: str


class Answer(msgspec.Struct):
    """One line of output."""

    id: Any
    is_fault: bool
    class_: str = msgspec.field(name="class")
    layer: str
    kind: str
    code: str
    device: str


class Refusal(msgspec.Struct):
    """One line of output in place of an answer."""

    id: Any
    line: int
    error: str


_decode: Final = msgspec.json.Decoder(Asked).decode
_encode: Final = msgspec.json.Encoder().encode_lines


def run(source: int, sink: int) -> int:
    """From one descriptor to another until the first ends; gives the exit code."""
    number, exit_code = 0, 0
    for lines in _batches(source):
        answers: list[Answer | Refusal] = []
        for raw in lines:
            number += 1
            if not raw.strip():
                continue
            answer = answered(raw, number)
            if isinstance(answer, Refusal):
                exit_code = 2
            answers.append(answer)
        _write(sink, _encode(answers))
    return exit_code


def answered(raw: bytes, number: int) -> Answer | Refusal:
    """What is to be said of one line."""
    if len(raw) > LONGEST:
        return Refusal(None, number, f"at most {LONGEST} bytes expected in a line, found more")
    try:
        asked = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        try:
            asked = _decode(raw.decode("utf-8", "replace").encode())
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return Refusal(None, number, f'an object {{"id", "text", "stream"}} expected: {error}')
    if asked.stream not in STREAMS:
        return Refusal(asked.id, number, f"stream: one of {', '.join(sorted(STREAMS))} expected, found {asked.stream!r}")
    found = classify(asked.text, asked.stream)
    if found is NOTHING:
        return Answer(asked.id, False, "ignore", "", "benign", "", "")  # noqa: FBT003 - a field
    return Answer(asked.id, found.class_ not in NOT_FAULTS, found.class_, found.layer, found.kind or "benign", found.code, found.device)


def _batches(source: int) -> Iterator[list[bytes]]:
    """Whole lines, as many as have come; the end of one that is too long is dropped."""
    rest: list[bytes] = []
    kept = 0
    while chunk := os.read(source, CHUNK):
        head, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            if kept <= LONGEST:
                rest.append(chunk)
            kept += len(chunk)
            continue
        lines = (b"".join(rest) + head).split(b"\n")
        rest, kept = [tail] if tail else [], len(tail)
        yield lines
    if rest:
        yield [b"".join(rest)]


def _write(sink: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view) :]
