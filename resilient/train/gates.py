"""Gates: calls that change shared state run only in a step whose vote passed.

Think of a lock on a canal: the gate opens when the water stands equally high on both sides, and whoever comes before that waits.

Contract: `close_over` puts a gate before `step` of every tracked optimizer and `update_parameters` of every tracked AveragedModel, on the
instance, so that GradScaler, schedulers and the user's own calls all meet it. The first gate of a step asks the loop (a vote); later ones
of the same step follow its answer. A call outside of a step's body goes through. None of them runs while what it changes is being copied
(train/tier0.py), and neither does a `load_state_dict` of what is tracked.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from resilient.train.state import gated

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.train.loop import Loop
    from resilient.train.state import Tracked


class Gates:
    """The gates of one loop."""

    def __init__(self, loop: Loop) -> None:
        """No gate yet."""
        self._loop = loop

    def close_over(self, tracked: Tracked) -> None:
        """Gate what is tracked."""
        tier0 = self._loop.tier0

        def settle(*_: Any) -> None:  # no method: a deep copy of the module takes its hooks along
            tier0.settle()

        for optimizer in tracked.optimizers.values():
            optimizer.step = self.guard(optimizer.step)  # type: ignore[method-assign]
            optimizer.register_load_state_dict_pre_hook(settle)
        for module in tracked.modules.values():
            module.register_load_state_dict_pre_hook(settle)
            if gated(module):
                module.update_parameters = self.guard(module.update_parameters)  # type: ignore[assignment, arg-type]

    def guard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, doing nothing (and returning None) in a step that does not count."""

        @functools.wraps(call)  # with its attributes: lr_scheduler leaves a mark on optimizer.step and looks for it
        def gate(*args: Any, **kwargs: Any) -> Any:
            if not self._passes():
                return None
            result = call(*args, **kwargs)
            self._check_unspoiled()  # a closure may have run forward and backward in there
            return result

        return gate

    def _passes(self) -> bool:
        scope = self._loop.scope
        if not scope.active:
            self._loop.tier0.settle()
            return True
        if not scope.gated:
            scope.open = self._loop.gate()
        self._check_unspoiled()
        return scope.open

    def _check_unspoiled(self) -> None:
        """The round broke between two gates of one step: what the first one let through cannot be taken back here."""
        loop = self._loop
        if loop.scope.active and loop.scope.spoiled and loop.scope.open and not loop.warming:
            loop.rounds.leave(f"step {loop.ledger.step}: the round broke between two of its optimizers")
