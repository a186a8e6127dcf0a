"""Steps as the user meets them: the number that `run.steps` yields, and the decorator for loops that own their counter.

Think of a pianist practising bar by bar: whoever turns the pages (`run.steps`) turns back when a bar went wrong; or the pianist turns the
pages alone (`@resilient.step`), and then the bar is simply played again until it is right, before the call returns.

Contract: both drive the same `Loop`. In `with step:` and in a decorated call an exception that leaves a broken step is swallowed and the
step is done again; in a sound step it goes up. A newcomer whose loop begins at zero while the run is at step n runs through its
first n calls without doing them (they return what the last warm-up returned), so that its own counter comes right.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Self

from resilient.errors import RoundAborted, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from resilient.train.loop import Loop


class Step(int):
    """The number of the step to do, 0-based; also a context manager: `with step:` around the body lets a broken step end anywhere."""

    _loop: Loop | None = None

    @classmethod
    def of(cls, number: int, loop: Loop | None) -> Step:
        """The step `number` of `loop` (None: a run without recovery)."""
        step = cls(number)
        step._loop = loop
        return step

    def __enter__(self) -> Self:
        """The body begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Swallow what leaves a broken step: the loop yields the same step again."""
        if self._loop is None or error is None or isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            return False
        return self._loop.excuse(error)


def step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function` one step of the run: it commits on every rank, or is called again with the same arguments.

    `resilient.init` and `run.track` come before the first call. Iterators among the arguments belong into `run.replayable`.
    Under plain python and torchrun the function is called as it is.
    """
    calls = 0
    last: Any = None
    initial = b""  # own state at the first call: a newcomer's loop runs on from there to the step that it is to do

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, last, initial
        from resilient.train.run import current  # noqa: PLC0415  run.py imports this module

        run = current()
        if run is None:
            msg = f"@resilient.step: {function.__name__} was called before resilient.init()"
            raise UsageError(msg)
        loop = run.loop
        number, calls = calls, calls + 1
        if loop is None:
            result = function(*args, **kwargs)
            run.publish()
            return result
        if number == 0:
            if loop.canary.function is not None:
                msg = "run.canary: it goes with run.steps; a loop that owns its counter cannot go back with all ranks at once"
                raise UsageError(msg)
            initial = loop.tracked.own()
            loop.rounds.defer = True
        loop.open()
        while True:
            if not loop.warming:
                loop.check_calls(number)
                if number < loop.ledger.step:
                    if number == 0:
                        loop.tracked.load_own(initial)  # what the loop takes between calls (items, random numbers) it takes as at the start
                    return last
                loop.rounds.put_deferred()
            loop.next_step(None)
            try:
                result = function(*args, **kwargs)
            except (Exception, RoundAborted) as error:
                if not loop.excuse(error):
                    raise
                result = None
            last = result
            if loop.end_step():
                loop.calls = calls
                return result

    return call
