"""What all wire types have in common: names, ranges, and how a message is tagged."""

from typing import Annotated

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""A job or a device: one subject token."""

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, lower-case hexadecimal."""

Text = Annotated[str, Meta(max_length=2000)]
Label = Annotated[str, Meta(min_length=1, max_length=200)]

Count = Annotated[int, Meta(ge=0, le=2**53)]
Round = Annotated[int, Meta(ge=0, lt=2**32 - 1)]
Part = Annotated[int, Meta(ge=0, lt=2**32)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
"""Any finite float: a range refuses NaN and the infinities on decode."""

Range = tuple[Annotated[int, Meta(ge=0, lt=2**20)], Annotated[int, Meta(ge=1, le=2**16)]]
"""Directions [first, first + count) of a round's pool."""

Ranges = Annotated[list[Range], Meta(max_length=4096)]


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag_field="type",
    tag=True,
):
    """A tagged record of the wire: a map with `type`, its schema version `v`, and its fields.

    New fields get defaults, a changed meaning gets a new type; unknown fields are ignored.
    """

    v: Annotated[int, Meta(ge=1)] = 1


class Record(msgspec.Struct, frozen=True):
    """A part of a message."""
