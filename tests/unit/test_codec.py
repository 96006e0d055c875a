"""The codec: plain MessagePack out, and nothing but MalformedMessage for what is not a message."""

from typing import Any, get_args

import msgpack  # pyright: ignore[reportMissingTypeStubs]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import decode, decode_manifest, encode
from shared.errors import MalformedMessage
from shared.messages import AnyMessage, JobEnded, LogEvent, Message, StopJob, UpdateSettled

PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def pack(value: Any) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def test_an_encoder_that_is_not_ours_reads_and_writes_the_same_bytes() -> None:
    event = JobEnded(job="a", epoch=0, round=3, reason="finished", digest="0" * 64)
    plain = {
        "type": "JobEnded",
        "v": 1,
        "job": "a",
        "epoch": 0,
        "round": 3,
        "reason": "finished",
        "digest": "0" * 64,
    }
    assert msgpack.unpackb(encode(event)) == plain
    assert decode(pack(plain), JobEnded) == event


def test_unknown_fields_are_ignored_and_unknown_kinds_declined() -> None:
    later = {"type": "StopJob", "v": 7, "job": "a", "gently": True}
    assert decode(pack(later), StopJob) == StopJob(v=7, job="a")
    with pytest.raises(MalformedMessage):
        decode(pack({"type": "StopGently", "job": "a"}), Message)


def test_a_message_of_another_type_is_malformed_where_it_has_no_meaning() -> None:
    with pytest.raises(MalformedMessage, match="StopJob"):
        decode(encode(StopJob(job="a")), UpdateSettled)


@given(st.binary(max_size=300))
def test_random_bytes_are_malformed_at_worst(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data, Message)
    with pytest.raises(MalformedMessage):
        decode_manifest(data)


@given(PLAIN, st.sampled_from([kind.__name__ for kind in Message.__subclasses__()]))
def test_any_map_under_a_known_name_is_malformed_at_worst(value: Any, name: str) -> None:
    fields = value if isinstance(value, dict) else {"job": value, "key": value}
    try:
        message = decode(pack({**fields, "type": name}), Message)
    except MalformedMessage:
        return
    assert type(message).__name__ == name


@pytest.mark.parametrize("bomb", [b"\x91", b"\x81\xa1a", b"\x81\x91", b"\xdc\xff\xff", b"\xc1"])
@pytest.mark.parametrize("depth", [10, 1_000, 100_000])
def test_a_bomb_of_nested_containers_is_malformed(bomb: bytes, depth: int) -> None:
    for inside in (bomb * depth, b"\x82\xa4type\xa7StopJob\xa5extra" + bomb * depth):
        with pytest.raises(MalformedMessage):
            decode(inside, Message)


def test_every_message_type_has_a_place_in_the_union() -> None:
    assert set(get_args(AnyMessage)) == set(Message.__subclasses__())
    assert set(get_args(LogEvent)) <= set(get_args(AnyMessage))
