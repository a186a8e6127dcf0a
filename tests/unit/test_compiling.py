"""What torch.compile takes is in a section of the run, on whatever thread and however often."""

from __future__ import annotations

import contextlib
import importlib

import torch

from resilient.train import compiling


class Sections:
    def __init__(self):
        self.seen = []
        self.open = 0

    @contextlib.contextmanager
    def section(self, name):
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


def test_each_compilation_is_a_section_of_the_newest_run(monkeypatch):
    monkeypatch.setattr(compiling, "_run", None)
    importlib.import_module("torch._dynamo")  # as an optimizer does
    old, new = Sections(), Sections()
    compiling.announce(old)
    compiling.announce(new)
    depths = []

    def backend(graph, _):
        depths.append((old.open, new.open))
        return graph.forward

    doubled = torch.compile(lambda x: 2 * x, backend=backend)
    for shape in ((3,), (3, 3)):
        assert torch.equal(doubled(torch.ones(shape)), torch.full(shape, 2.0))
    assert depths == [(0, 1), (0, 1)]
    assert (old.open, new.open) == (0, 0)
