"""The bytes of every message, so that nobody changes a format without seeing it here.

wire.txt holds one line per message and form: name, "full" (every field given) or "bare" (only what has no default), hex of the msgpack.
A new field with a default changes "full" (run `python tests/golden/test_wire_bytes.py` to write the file anew) and must not change "bare"
of an old sender into something that cannot be read: old bytes are decoded here too.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec import inspect

from resilient.core import messages

FILE = Path(__file__).with_name("wire.txt")
MESSAGES = [c for c in vars(messages).values() if isinstance(c, type) and issubclass(c, messages.Msg) and c is not messages.Msg]


def sample(kind: inspect.Type):
    """Some value of this type."""
    match kind:
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 7
        case inspect.FloatType():
            return 0.5
        case inspect.StrType():
            return "x"
        case inspect.BytesType():
            return b"\x00\xff"
        case inspect.LiteralType():
            return kind.values[-1]
        case inspect.VarTupleType():
            return (sample(kind.item_type),)
        case inspect.TupleType():
            return tuple(sample(item) for item in kind.item_types)
        case inspect.DictType():
            return {sample(kind.key_type): sample(kind.value_type)}
        case inspect.UnionType():
            return sample(next(t for t in kind.types if not isinstance(t, inspect.NoneType)))
        case inspect.StructType():
            return kind.cls(**{f.name: sample(f.type) for f in kind.fields})
    raise AssertionError(kind)


def forms(cls):
    fields = inspect.type_info(cls).fields
    yield "full", cls(**{f.name: sample(f.type) for f in fields})
    yield "bare", cls(**{f.name: sample(f.type) for f in fields if f.required})


def lines():
    return [f"{cls.__name__} {form} {msgspec.msgpack.encode(value).hex()}" for cls in MESSAGES for form, value in forms(cls)]


def test_no_message_has_changed_its_bytes():
    assert FILE.read_text().splitlines() == lines(), (
        f"a format changed: if that is meant, run python {__file__}, and say so in the CHANGELOG"
    )


@pytest.mark.parametrize("line", FILE.read_text().splitlines() if FILE.exists() else [], ids=lambda line: " ".join(line.split()[:2]))
def test_old_bytes_can_be_read(line):
    name, form, data = line.split()
    cls = getattr(messages, name)
    value = msgspec.msgpack.decode(bytes.fromhex(data), type=cls)
    assert value == dict(forms(cls))[form]


def test_what_has_no_default_is_refused_when_missing():
    data = msgspec.msgpack.encode({"type": "Suspect", "round": 1})
    with pytest.raises(msgspec.ValidationError, match="text"):
        msgspec.msgpack.decode(data, type=messages.WorkerUp)


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
