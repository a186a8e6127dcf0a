"""How well lines are read: `python tests/bench/score_lines.py tests/data/lines/*.jsonl`.

Think of an examiner who hands out the questions without the answers, collects the sheets, and only then opens the key.
Each labelled line goes to `resilient diagnose --jsonl` in a process of its own, as {"id", "text", "stream"} and nothing more; what comes
back is held against the label. Beside it stands what a plain search for a few words would have said of the same lines.

Contract: exit code 0 if every file meets the bounds below, 1 if one does not, 2 if the program gave no answer to some line.
Files named arguable*.jsonl count by `class_ok` alone: there, whether it is a fault is a matter of taste.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

Line = dict[str, Any]
Answer = dict[str, Any]

CLASSES = ("ignore", "user", "app-restart", "gpu-reset", "replace", "cordon")
NODE = frozenset({"gpu-reset", "replace", "cordon"})  # classes that take a device or a node away
PRECISION = 0.97  # of is_fault, to be passed
RECALL = 0.95
WORDS = re.compile(r"error|xid|fail|fatal|timeout", re.IGNORECASE)  # what an operator would grep for
ROOT = pathlib.Path(__file__).parents[2]


class Score(NamedTuple):
    """What is counted over one set of lines."""

    lines: int
    precision: float
    recall: float
    class_ok: float
    blamed: list[str]  # ids: said by or of the program, and yet a class that takes a node away
    wrong: list[str]  # ids whose is_fault differs, or whose class is not among class_ok


def load(path: str | pathlib.Path) -> list[Line]:
    """Labelled lines of one file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def rate(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def of_fault(lines: list[Line], said: dict[str, bool]) -> tuple[float, float]:
    """Precision and recall of is_fault."""
    both = sum(line["is_fault"] and said[line["id"]] for line in lines)
    return rate(both, sum(said[line["id"]] for line in lines)), rate(both, sum(line["is_fault"] for line in lines))


def blames(line: Line, class_: str) -> bool:
    """Whether this answer takes hardware away for something that a program did or wrote."""
    of_program = line["class"] == "user" or (line["class"] == "ignore" and line["stream"] in {"stdout", "stderr"})
    return of_program and class_ in NODE and class_ not in line["class_ok"]


def score(lines: list[Line], answers: dict[str, Answer]) -> Score:
    precision, recall = of_fault(lines, {line["id"]: bool(answers[line["id"]]["is_fault"]) for line in lines})
    wrong, blamed, right = [], [], 0
    for line in lines:
        answer = answers[line["id"]]
        fits = answer["class"] in line["class_ok"]
        right += fits
        if not fits or answer["is_fault"] != line["is_fault"]:
            wrong.append(line["id"])
        if blames(line, answer["class"]):
            blamed.append(line["id"])
    return Score(len(lines), precision, recall, rate(right, len(lines)), blamed, wrong)


def ask(lines: list[Line]) -> tuple[dict[str, Answer], float]:
    """The program's answers by id, and the seconds it took (the start of the interpreter included)."""
    given = "".join(json.dumps({key: line[key] for key in ("id", "text", "stream")}, ensure_ascii=False) + "\n" for line in lines)
    command = [sys.executable, "-m", "resilient.cli", "diagnose", "--jsonl"]
    with tempfile.TemporaryDirectory() as elsewhere:  # so that it cannot find the labels beside it
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "agents"), os.environ.get("PYTHONPATH", "")])}
        began = time.monotonic()
        done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", cwd=elsewhere, env=env, timeout=300, check=False)
        took = time.monotonic() - began
    answers = {}
    for row in done.stdout.splitlines():
        answer = json.loads(row)
        answers[answer["id"]] = answer
    if missing := [line["id"] for line in lines if line["id"] not in answers]:
        print(f"{' '.join(command[1:])}: exit {done.returncode}, no answer to {len(missing)} of {len(lines)} lines, first {missing[0]}")
        print(done.stderr[-2000:])
        sys.exit(2)
    return answers, took


def table(rows: list[list[Any]]) -> None:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  "
            + "  ".join(
                str(cell).rjust(width) if i else str(cell).ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def told(name: str, lines: list[Line], answers: dict[str, Answer], took: float, show: int) -> bool:
    """Print what was found of one file. Whether it met the bounds."""
    arguable = name.startswith("arguable")
    found = score(lines, answers)
    words = of_fault(lines, {line["id"]: bool(WORDS.search(line["text"])) for line in lines})
    faults = sum(line["is_fault"] for line in lines)
    print(f"\n{name}: {len(lines)} lines, {faults} faults, {took:.2f} s")
    table(
        [
            ["", "precision", "recall", "class ok", "same class", "blamed"],
            [
                "resilient diagnose",
                f"{found.precision:.3f}",
                f"{found.recall:.3f}",
                f"{found.class_ok:.3f}",
                f"{rate(sum(answers[x['id']]['class'] == x['class'] for x in lines), len(lines)):.3f}",
                len(found.blamed),
            ],
            ["search for words", f"{words[0]:.3f}", f"{words[1]:.3f}", "", "", ""],
        ]
    )
    pairs = collections.Counter((line["class"], answers[line["id"]]["class"]) for line in lines)
    print("\n  label (row) and answer (column)")
    table([["", *CLASSES], *([want, *(pairs[want, got] or "." for got in CLASSES)] for want in CLASSES)])
    agreed = {key: sum(answers[line["id"]].get(key, "") == line[key] for line in lines) for key in ("layer", "kind", "code", "device")}
    print("\n  same " + ", ".join(f"{key} {rate(count, len(lines)):.3f}" for key, count in agreed.items()))
    layers = collections.Counter(line["layer"] for line in lines)
    missed = collections.Counter(line["layer"] for line in lines if line["id"] in set(found.wrong))
    print("  wrong by layer: " + (", ".join(f"{layer} {count} of {layers[layer]}" for layer, count in missed.most_common()) or "none"))
    print(f"  lines of programs that became node faults: {', '.join(found.blamed) or 'none'}")
    by_id = {line["id"]: line for line in lines}
    for name_of in found.wrong[:show]:
        line, answer = by_id[name_of], answers[name_of]
        print(
            f"    {name_of} {line['stream']} want {line['class']} got {answer['class']} ({answer.get('kind', '')}): {line['text'][:150]!r}"
        )
    if arguable:
        return not found.blamed
    return found.precision > PRECISION and found.recall > RECALL and not found.blamed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--misses", type=int, help="so many wrong lines are shown per file; if not given 40, and none of heldout*.jsonl")
    options = parser.parse_args()
    met = []
    for path in options.files:
        name, lines = pathlib.Path(path).name, load(path)
        answers, took = ask(lines)
        show = (0 if name.startswith("heldout") else 40) if options.misses is None else options.misses
        met.append(told(name, lines, answers, took, show))
    verdict = "met" if all(met) else "NOT met"
    print(f"\nbounds: precision > {PRECISION}, recall > {RECALL}, no line of a program a node fault: {verdict}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
