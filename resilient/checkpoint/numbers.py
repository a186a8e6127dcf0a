"""Numbers: raw tensor memory as numpy has it, and from one floating dtype to another.

Think of a money changer: small notes into large ones costs nothing; the other way round, what is left over is rounded to the nearest note.

Contract: pure; numpy, not torch. numpy has no bfloat16, which is the upper half of a float32. Rounding is to nearest, ties to even, as
torch does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from resilient.checkpoint.layout import ITEMSIZES

if TYPE_CHECKING:
    from resilient.checkpoint.snapshot import Buffer

FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
_PLAIN: Final = ("float16", "float32", "float64", "complex64", "complex128", "bool")


def array(memory: Buffer, dtype: str) -> Any:
    """(n,) numpy array of the values; of a dtype that numpy lacks and that is no bfloat16 (float8_...), of its bytes."""
    import numpy as np  # noqa: PLC0415  0.1 s, and only who looks at values pays them

    if dtype == "bfloat16":
        return (np.frombuffer(memory, "<u2").astype("<u4") << 16).view("<f4")
    known = dtype in _PLAIN or "int" in dtype
    return np.frombuffer(memory, dtype if known else f"<u{ITEMSIZES[dtype]}")


def converted(memory: Buffer, source: str, target: str) -> bytes:
    """Values of one of FLOATS as another of them."""
    import numpy as np  # noqa: PLC0415

    values = array(memory, source)
    with np.errstate(over="ignore"):  # what is too large becomes inf, as in torch
        if target != "bfloat16":
            return bytes(values.astype(target).tobytes())
        single = values.astype("<f4")
        bits = single.view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bytes(np.where(np.isnan(single), 0x7FC0, rounded).astype("<u2").tobytes())
