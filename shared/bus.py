"""What a process may ask of the broker: two protocols, one for talk, one for streams.

`nats_bus` speaks to a real server, `memory_bus` is its twin for tests. Nothing here decodes.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

SEQUENCE_HEADER = "Nats-Sequence"
LAST_SEQUENCE_HEADER = "Nats-Last-Sequence"
"""On a republished message: its stream sequence, and its subject's one before (0: none)."""
PENDING_HEADER = "Nats-Num-Pending"
"""On a message of a batch that somebody has read: he chose where it arrives, so it is no news."""
INBOXES = ("_INBOX", "_R_.")
"""An answer goes nowhere else: who asks chooses where, and we may publish where it may not.

`_R_.` is what nats-server puts in place of the inbox of who asks from another account.
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it arrived. `reply` is where an answer goes, empty if none is awaited.

    A `reply` that is no inbox never gets here: it is emptied.
    """

    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    reply: str = ""


GAP = Delivery("", b"")
"""Stands where deliveries may be missing: after a reconnect, or after some were dropped."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of messages over a link since it was made; the protocol's own are not counted."""

    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """One message of a stream, by its stream sequence (from 1)."""

    sequence: int
    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Appended:
    sequence: int


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as it should be; `ensure_stream` creates it or leaves an equal one alone."""

    name: str
    subjects: tuple[str, ...]
    memory: bool = False
    max_bytes: int = -1
    max_age_s: float = 0.0
    max_per_subject: int = -1
    work_queue: bool = False
    republish_from: str = ""
    republish_to: str = ""
    replicas: int = 1
    silent: bool = False
    """Nothing is acknowledged: the broker would say so wherever a publisher tells it to."""


class Batch(Protocol):
    """Messages taken from a stream; each is redelivered unless `done` is called in time."""

    @property
    def messages(self) -> Sequence[Stored]: ...

    async def done(self) -> None:
        """Acknowledge all of them. An acknowledgement that is lost means they come again."""
        ...

    async def again(self, delay_s: float) -> None:
        """Give all of them back, to be delivered after `delay_s`."""
        ...


class Bus(Protocol):
    """Core publish, subscribe and request; never gives up reconnecting."""

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        """Hand one message to the broker; nobody says whether anyone got it.

        Raises:
            TransientError: not connected and the outgoing buffer is full.
        """
        ...

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """The answer to one request.

        Raises:
            TransientError: nobody serves the subject, or nobody answered in time.
        """
        ...

    def subscribe(
        self, subject: str, *, queue: str = "", limit: int = 4096, gaps: bool = False, each: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Messages on `subject` (may hold wildcards) from now on; past `limit` waiting, dropped.

        With `each`, past so many waiting of one subject as well: no sender fills the queue alone.

        A dropped message is counted in `dropped`; with `gaps`, GAP stands in its place, and
        wherever the connection was lost and is back. The iterator ends when the bus is closed.
        """
        ...

    @property
    def connected(self) -> bool: ...

    @property
    def reconnects(self) -> int: ...

    @property
    def dropped(self) -> int: ...

    @property
    def traffic(self) -> Traffic:
        """What went over all connections so far; it never falls."""
        ...

    async def flush(self) -> None:
        """The broker has all that was published before.

        Raises:
            TransientError: it did not say so in time.
        """
        ...

    async def close(self) -> None:
        """Hand over what is buffered, if connected, and end every subscription."""
        ...


class Streams(Protocol):
    """The broker's streams. Every call raises TransientError where the broker does not answer."""

    async def ensure_stream(self, spec: StreamSpec) -> None: ...

    async def append(
        self,
        subject: str,
        data: bytes,
        *,
        stream: str,
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Appended:
        """Store one message and return its sequence.

        With `expected_last`, only if that is the *stream's* last sequence (NATS error 10071).

        Raises:
            SequenceMismatch: it is not.
        """
        ...

    async def last_sequence(self, stream: str, subject: str = "") -> int:
        """The last sequence that whoever leads the stream has, of all or of one subject; 0: none.

        Every other read may be answered by a replica that does not have it yet.
        """
        ...

    async def get(self, stream: str, sequence: int) -> Stored | None:
        """One message by sequence through Direct Get, or None."""
        ...

    async def get_last(
        self, stream: str, subject: str, *, timeout_s: float = 10.0
    ) -> Stored | None:
        """The newest message of a subject (no wildcards) through Direct Get, or None."""
        ...

    async def subjects(self, stream: str, pattern: str) -> set[str]:
        """The subjects that match `pattern` and hold a message."""
        ...

    async def purge(self, stream: str, subject: str) -> int:
        """Delete every message of `subject` (may hold wildcards); how many there were."""
        ...

    def read(
        self, stream: str, subject: str, *, after: int = 0, up_to: int = 0
    ) -> AsyncGenerator[Stored, None]:
        """Stored messages of `subject` (may hold wildcards) with sequence > `after`, in order.

        Batched Direct Get; no consumer is made. Ends with the last stored one (or `up_to`).
        """
        ...

    async def take(self, stream: str, consumer: str, *, limit: int, wait_s: float) -> Batch | None:
        """Up to `limit` unacknowledged messages by the durable `consumer`, made when missing.

        None if nothing came within `wait_s`. One process takes by one consumer: its first call
        gets at once what a process before it had taken and not acknowledged.
        """
        ...


class Link(Bus, Streams, Protocol):
    """One connection that does both, as both implementations do."""


class SequenceMismatch(Exception):
    """The stream's last sequence is not the expected one. `last` is what it is, -1 if unknown."""

    def __init__(self, text: str, last: int = -1) -> None:
        super().__init__(text)
        self.last = last
