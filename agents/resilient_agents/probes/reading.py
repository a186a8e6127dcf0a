"""Reading: small files of the kernel, where anything may be missing, empty, unreadable or stranger than it should be.

Contract: None for what cannot be read or is no number: on a recorded tree, in a container and on next year's kernel half of the files are
missing, and that is never an error. At most `BYTES_MAX` of a file are read. What is not UTF-8 is replaced.
"""

from __future__ import annotations

import os
import re
from typing import Final

BYTES_MAX: Final = 1 << 20
_NUMBER: Final = re.compile(r"[+-]?(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})\b")


def text(path: str) -> str | None:
    """The whole file, without spaces around."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(fd, BYTES_MAX).decode(errors="replace").strip()
        finally:
            os.close(fd)
    except OSError:
        return None


def lines(path: str) -> list[str]:
    """Of a file that is given in pieces, as most of /proc is."""
    try:
        with open(path, "rb") as file:
            return file.read(BYTES_MAX).decode(errors="replace").splitlines()
    except OSError:
        return []


def number(path: str) -> int | None:
    """The number with which the file begins; hexadecimal after 0x."""
    found = _NUMBER.match(text(path) or "")
    return int(found[0], 0 if "x" in found[0].lower() else 10) if found else None


def names(path: str) -> list[str]:
    """What is in the directory, sorted."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def pairs(path: str) -> dict[str, int]:
    """Lines of a name and a number ("oom_kill 3", "MemFree: 12 kB")."""
    found = {}
    for line in lines(path):
        words = line.split()
        if len(words) >= 2 and (value := _NUMBER.fullmatch(words[1])) is not None:
            found[words[0].rstrip(":")] = int(value[0], 0 if "x" in value[0].lower() else 10)
    return found
