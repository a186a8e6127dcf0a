"""The scope: where in a step the training thread is, and whether loopback may finish what breaks here.

Think of a stage: while the curtain is up (inside a module's forward or backward) an actor may be replaced by an echo, for the audience
sees only the whole scene, and that is thrown away. On the street outside (saving, evaluating, deciding) an echo would be a lie.

Contract: `may_loop` is true
  1. inside forward or backward of a tracked module, in a step of ours;
  2. between the end of a backward and the first gate, for operations whose loopback value follows from this rank's own input
     (clipping's norm, a manual gradient average): their result can only reach the gate, which is shut.
Everywhere else a broken round raises RoundAborted. Written by the training thread only, read by the waiter too.
Rule 2 was added to design rule 1: without it, gradient clipping under FSDP2 could not be finished in a bare `for` loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class Scope:
    """Flags of the step under way."""

    def __init__(self) -> None:
        """Outside of any step."""
        self.active = False  # inside a step's body
        self.gated = False  # the first gate of this step was reached
        self.open = False  # ... and the vote passed
        self.snapshot = False  # ... and it asked for a snapshot at the boundary
        self.checkpoint: bool | None = None  # ... that is to go to the persistent tier; None: how the vote ended is not known here
        self.backward = False  # a collective was launched by this step's backward
        self.late_backward = False  # ... after the first gate: steps of this script are not atomic (two optimizers in turn, closures)
        self.spoiled = False  # an operation after an open gate was completed in loopback: no optimizer may use what follows from it
        self.forward_depth = 0
        self.forwards = 0  # outermost forwards begun with gradients on, and backwards seen: see train/wrappers.py
        self.since_ns = 0  # when the step before was complete, until this one's first forward; 0 = nothing is measured
        self.loaded: Callable[[int], None] = lambda _since: None  # called then, with it
        self._hooked: set[int] = set()

    def enter(self) -> None:
        """A step's body begins."""
        self.active = True
        self.gated = self.open = self.snapshot = self.backward = self.spoiled = False
        self.checkpoint = None
        self.forward_depth = self.forwards = 0

    def leave(self) -> None:
        """It ended, or was left."""
        self.active = False
        self.forward_depth = 0

    def may_loop(self, *, echo: bool) -> bool:
        """Whether an operation launched now may be completed in loopback if the round is broken."""
        if not self.active:
            return False
        if torch._C._current_graph_task_id() != -1:  # noqa: SLF001  there is no public way to ask "inside backward?"
            self.backward = True
            self.late_backward = self.late_backward or self.open
            return True
        if self.forward_depth > 0:
            return True
        return echo and self.backward and not self.gated

    def watch(self, module: nn.Module) -> None:
        """Count this module's outermost forwards."""
        if id(module) in self._hooked:
            return
        self._hooked.add(id(module))

        def before(_module: nn.Module, _args: Any) -> None:
            self.forward_depth += 1
            if self.since_ns and self.active:
                since, self.since_ns = self.since_ns, 0
                self.loaded(since)
            if torch.is_grad_enabled():
                self.forwards += 1

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.forward_depth = max(0, self.forward_depth - 1)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)
