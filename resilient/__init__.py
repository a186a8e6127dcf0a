"""resilient: a training run loses a rank, and goes on about a second later with nothing lost.

The doors that a training script uses. Nothing here imports torch before it is needed: agents and command-line tools import this too.

    run = resilient.init()
    run.track(model=net, optimizer=opt)
    for step in run.steps(10_000):
        ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resilient.errors import CheckpointError, ConfigError, ProtocolError, ResilientError, RoundAborted, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.train.run import Run

__version__ = "0.1.0"
__all__ = ["CheckpointError", "ConfigError", "ProtocolError", "ResilientError", "RoundAborted", "UsageError", "init", "step"]


def init(backend: str | None = None, *, any_rank: bool = False) -> Run:
    """Join the run and initialise torch.distributed. See `resilient.train.run.init`."""
    from resilient.train import run  # noqa: PLC0415  torch is loaded only where there is training

    return run.init(backend, any_rank=any_rank)


def step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the train_step of a loop that owns its counter. See `resilient.train.step.step`."""
    from resilient.train import step as module  # noqa: PLC0415  as above

    return module.step(function)
