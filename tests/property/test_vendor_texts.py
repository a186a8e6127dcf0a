"""Whatever a vendor's tool prints, its parser gives something and comes to an end."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilient_agents.devices import pci, visible
from resilient_agents.probes.amd import bad_pages, counts
from resilient_agents.probes.ascend import CHIPS_MAX, parse_counts, parse_health, parse_link, parse_list
from resilient_agents.probes.moore_threads import GPUS_MAX, parse

DATA = Path(__file__).parents[1] / "data" / "vendors"
SAMPLES = [path.read_text() for path in sorted(DATA.rglob("*.*")) if path.suffix in {".txt", ".json"}]
PARSERS = [parse_list, parse_health, parse_counts, parse_link, parse, counts, bad_pages, pci]

bits = st.one_of(st.sampled_from(SAMPLES).flatmap(lambda text: st.integers(0, len(text)).map(lambda at: text[:at])), st.text(max_size=200))
texts = st.one_of(
    st.lists(bits, max_size=4).map("".join),
    st.binary(max_size=400).map(lambda raw: raw.decode("utf-8", "replace")),
    st.lists(st.sampled_from(["|", "+", ":", "0", "OK", "NPU", " ", "\n", "0000:61:00.0", "ue: ", "[", "{", '"gpus"']), max_size=80).map(
        "".join
    ),
)


@given(texts)
def test_any_text(text):
    for parser in PARSERS:
        parser(text)
    visible((), text)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "|" * 1_000_000, " " * 1_000_000 + ":", "a " * 500_000 + ": 1", "0" * 1_000_000, "ue: " + "9" * 1_000_000]
)
def test_huge_lines(text):
    for parser in PARSERS:
        began = time.process_time()
        parser(text)
        assert time.process_time() - began < 5  # of a catastrophe, not of speed


def test_huge_lists_are_cut():
    assert len(parse_list((DATA / "ascend/list.txt").read_text() * 100)) == CHIPS_MAX
    assert len(parse(json.dumps({"gpus": [{}] * 1000}))) == GPUS_MAX
