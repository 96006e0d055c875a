"""Strategies made from the message types: every field at its range's edges, beyond them, and wrong.

What they yield are plain values for `msgpack`, not messages: our own types would not hold most.
"""

import copy
import math
from typing import Any

import msgpack  # pyright: ignore[reportMissingTypeStubs]
from hypothesis import strategies as st
from msgspec import inspect

from shared.messages import Message

Values = st.SearchStrategy[Any]

KINDS = sorted(Message.__subclasses__(), key=lambda kind: kind.__name__)

_MOST_LISTED = 3
_LARGEST_FLOAT = 1.7976931348623157e308
WRONG: Values = st.sampled_from(
    [
        *(None, True, -1, 2**63, 2**64 - 1, -(2**63), 0.5, math.nan, math.inf, -math.inf),
        *("", "x" * 3000, "\0", "a.b", "a b", ">", "*", "\u202e", b"", b"\xff" * 3000, [], {}),
        *([[]] * 5000, [[[[[[[[]]]]]]]], {"type": "StopJob"}, {"": {"": {"": {}}}}, [None] * 70000),
        msgpack.ExtType(5, b"x"),
        msgpack.Timestamp(2**33, 5),
    ]
)
"""What belongs into no field, or hardly any."""


def pack(value: Any) -> bytes:
    data = msgpack.packb(value)
    assert data is not None
    return data


def messages(kind: type[Message]) -> Values:
    """Maps that are a `kind`: what its schema allows, at the edges of it for the most part."""
    return _edges(inspect.type_info(kind))


@st.composite
def spoiled(draw: st.DrawFn, kind: type[Message]) -> dict[str, Any]:
    """Such a map, of which something was replaced, left out or put in, at any depth."""
    found = draw(messages(kind))
    for _ in range(draw(st.integers(1, 3))):
        _spoil(draw, found)
    return found


@st.composite
def mangled(draw: st.DrawFn, kind: type[Message]) -> bytes:
    """The bytes of such a map, cut short, with bits flipped or with more behind them."""
    data = bytearray(pack(draw(st.one_of(messages(kind), spoiled(kind)))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                del data[at:]
            case 1 if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 2:
                data[at:at] = draw(st.binary(max_size=16))
            case _:
                data += draw(st.sampled_from([b"\x91", b"\x81\xa1a", b"\xc1"])) * 5000
    return bytes(data)


def _spoil(draw: st.DrawFn, value: Any) -> None:
    """Replace one thing somewhere below `value`."""
    while True:
        places: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = draw(st.sampled_from(places))
        inner = value[place]
        if isinstance(inner, dict | list) and inner and draw(st.booleans()):
            value = inner
            continue
        if isinstance(value, dict) and draw(st.integers(0, 3)) == 0:
            del value[place]
        else:
            value[place] = copy.deepcopy(draw(WRONG))
        return


def _edges(kind: inspect.Type) -> Values:
    """Values that the schema allows."""
    match kind:
        case inspect.Metadata():
            return _edges(kind.type)
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            low = -(2**63) if kind.ge is None and kind.gt is None else _least(kind)
            high = 2**63 - 1 if kind.le is None and kind.lt is None else _most(kind)
            return st.sampled_from([low, high]) | st.integers(low, min(high, low + 5))
        case inspect.FloatType():
            return _floats(kind)
        case inspect.StrType():
            return _texts(kind)
        case inspect.BytesType():
            sizes = [0, 1, 8, min(kind.max_length or 4096, 4096)]
            return st.sampled_from([b"\xff" * size for size in sizes] + [b"\x00\x00\x00\x80" * 2])
        case inspect.LiteralType():
            return st.sampled_from(list(kind.values))
        case inspect.ListType():
            least, most = kind.min_length or 0, min(kind.max_length or _MOST_LISTED, _MOST_LISTED)
            return st.lists(_edges(kind.item_type), min_size=least, max_size=max(least, most))
        case inspect.TupleType():
            return st.tuples(*map(_edges, kind.item_types)).map(list)
        case inspect.DictType():
            return st.dictionaries(_edges(kind.key_type), _edges(kind.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of([_edges(one) for one in kind.types])
        case inspect.StructType():
            return _structs(kind)
        case _:
            raise AssertionError(f"no values of {kind} are known here")


def _structs(kind: inspect.StructType) -> Values:
    if kind.array_like:
        return st.tuples(*[_edges(field.type) for field in kind.fields]).map(list)
    required = {f.encode_name: _edges(f.type) for f in kind.fields if f.required}
    optional = {f.encode_name: _edges(f.type) for f in kind.fields if not f.required}
    if kind.tag_field is not None:
        required[kind.tag_field] = st.just(kind.tag)
    return st.fixed_dictionaries(required, optional=optional)


def _least(kind: inspect.IntType) -> int:
    return kind.ge if kind.ge is not None else (kind.gt or 0) + 1


def _most(kind: inspect.IntType) -> int:
    return kind.le if kind.le is not None else (kind.lt or 0) - 1


def _floats(kind: inspect.FloatType) -> Values:
    low = kind.ge if kind.ge is not None else kind.gt
    high = kind.le if kind.le is not None else kind.lt
    least = -_LARGEST_FLOAT if low is None else low
    most = _LARGEST_FLOAT if high is None else high
    inside = [5e-324, -5e-324, 0.0, -0.0, 1.0, least, most, math.nextafter(least, math.inf)]
    wanted = [one for one in inside if least <= one <= most and (kind.gt is None or one > kind.gt)]
    return st.sampled_from(wanted)


def _texts(kind: inspect.StrType) -> Values:
    if kind.pattern is not None:
        return st.from_regex(kind.pattern, fullmatch=True)
    least, most = kind.min_length or 0, kind.max_length or 3000
    letters = ["a", "\0", "\n", '"', "\u202e", "\U0001f980", "<script>"]
    some = [(letter * most)[:most] for letter in letters] + ["a" * least]
    return st.sampled_from(some)
