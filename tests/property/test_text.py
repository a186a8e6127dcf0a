"""No text whatever makes the classifier raise, stall, or blame a node for what nobody said."""

from __future__ import annotations

import json
import pathlib
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from resilient_agents.diagnosis import catalogue, recorder
from resilient_agents.diagnosis.jsonl import Answer, Refusal, answered
from resilient_agents.diagnosis.peel import peel, plain
from resilient_agents.diagnosis.text import NOTHING, classify, relevant

LINES = pathlib.Path(__file__).parents[1] / "data" / "lines"
SAMPLE = [json.loads(line)["text"] for line in (LINES / "sample.jsonl").read_text().splitlines()]
EXAMPLES = [entry.example for entry in catalogue.lines()] + SAMPLE
STREAMS = st.sampled_from(["kmsg", "syslog", "stdout", "stderr"])
PIECES = st.sampled_from(EXAMPLES).flatmap(
    lambda it: st.tuples(st.just(it), st.integers(0, len(it)), st.integers(0, len(it))).map(lambda x: x[0][min(x[1:]) : max(x[1:])])
)
TEXTS = st.one_of(
    st.text(max_size=400),
    st.binary(max_size=400).map(lambda it: it.decode("utf-8", "replace")),
    st.lists(PIECES, max_size=6).map("\n".join),
    st.lists(PIECES, max_size=6).map("".join),
)
WORKERS = st.sampled_from(["stdout", "stderr"])


@settings(max_examples=400, deadline=None)
@given(TEXTS, STREAMS)
def test_any_text_gives_one_finding(text, stream):
    found = classify(text, stream)
    assert found.class_ in {"ignore", "user", "app-restart", "gpu-reset", "replace", "cordon"}
    assert found is NOTHING or (found.kind and found.layer and found.text is not None)
    assert len(found.text) <= 400
    relevant(text)
    assert len(peel(plain(text)).text) <= len(text) + 70


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_give_an_answer_or_a_refusal(raw):
    assert isinstance(answered(raw.replace(b"\n", b" "), 1), Answer | Refusal)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.sampled_from([b"\x80\x02", b"{", b""]))
def test_any_bytes_are_a_dump_or_are_refused(raw, head):
    try:
        recorder.read(head + raw)
    except recorder.DumpError:
        return


def test_huge_and_hostile_texts_take_a_moment():
    unit = "NCCL WARN NVRM: Xid (PCI: 0000:1a:00 Watchdog OpType= nvme0 timeout error EDAC UE mlx5_core Port DOWN loss nan exitcode "
    hostile = [unit * 50_000, "(" * 1_000_000, "nan " * 500_000, "a" * 5_000_000, "\x1b[" * 500_000, "[1.0] " * 300_000, "0: " * 300_000]
    hostile += [entry.example * 2_000 for entry in catalogue.lines()[::8]] + ["Traceback (most recent call last):\n" * 50_000]
    begin = time.process_time()
    for text in hostile:
        for stream in ("kmsg", "stderr"):
            classify(text, stream)
    assert time.process_time() - begin < 30.0  # some 0.02 s each; a pattern that backtracks would take for ever
