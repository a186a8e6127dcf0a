"""Compiling: torch.compile at work is a section, although nobody has said so.

Think of the sign "back in five minutes": whoever makes it by hand forgets it on the day when it is needed, so the door hangs it out itself.

Contract: after `announce(run)` each compilation in this process, on whatever thread, is a section of that run (run.section): a graph that
is compiled anew on one rank in the middle of training, while the others wait for it, is no hang. Once per process is enough; a later
run takes the place of the one before. Where dynamo is not loaded nothing is done, for then nothing can be compiled yet: `run.track` asks,
and by then an optimizer has loaded it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient.train.run import Run

_run: Run | None = None
_open = contextlib.ExitStack()


def announce(run: Run) -> None:
    """From now on."""
    global _run
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo.callback import callback_handler  # noqa: PLC0415 - private: tried with torch 2.11 and 2.13

    first, _run = _run is None, run
    if first:
        callback_handler.register_start_callback(_begun)
        callback_handler.register_end_callback(_ended)


def _begun(_: Any) -> None:
    if _run is not None:
        _open.enter_context(_run.section("torch.compile"))


def _ended(_: Any) -> None:
    _open.close()
