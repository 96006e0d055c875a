"""The broker in memory: the same two protocols, with hooks to drop, repeat, delay and cut off.

It exists for tests, beside the real one so that both obey one contract. No wall clock but where a
test asks for a delay, and for the redelivery of what is not acknowledged.
"""

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from shared.bus import (
    LAST_SEQUENCE_HEADER,
    SEQUENCE_HEADER,
    Appended,
    Batch,
    Delivery,
    SequenceMismatch,
    Stored,
    StreamSpec,
    Traffic,
)
from shared.errors import TransientError
from shared.mailbox import Mailbox

OUTGOING_BYTES = 2 * 1024 * 1024

Fate = Callable[[str, Delivery], Sequence[float]]
"""(client, delivery) -> after how many seconds each copy arrives: () drops it, (0,) is normal."""

AppendFate = Callable[[str, bytes], Literal["stored", "lost", "unanswered"]]
"""(subject, data) -> what becomes of an append; `unanswered` is stored all the same."""


def normally(_client: str, _delivery: Delivery) -> Sequence[float]:
    return (0.0,)


def stored(_subject: str, _data: bytes) -> Literal["stored", "lost", "unanswered"]:
    return "stored"


@dataclass(eq=False, slots=True)
class _Subscriber:
    client: "MemoryBus"
    pattern: str
    queue: str
    mailbox: Mailbox


@dataclass(eq=False, slots=True)
class _Consumer:
    """What a durable consumer has yet to deliver, and until when it waits for the rest."""

    ready: deque[int] = field(default_factory=deque[int])
    pending: dict[int, float] = field(default_factory=dict[int, float])

    def again(self) -> None:
        self.ready.extendleft(sorted(self.pending, reverse=True))
        self.pending.clear()


@dataclass(eq=False, slots=True)
class _Stream:
    spec: StreamSpec
    last: int = 0
    size_bytes: int = 0
    messages: dict[int, Stored] = field(default_factory=dict[int, Stored])
    by_subject: dict[str, dict[int, None]] = field(default_factory=dict[str, dict[int, None]])
    consumers: dict[str, _Consumer] = field(default_factory=dict[str, _Consumer])
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, pattern: str, after: int = 0) -> list[Stored]:
        """What is stored beyond `after` under subjects that match, in order."""
        found = [
            self.messages[sequence]
            for subject, sequences in self.by_subject.items()
            if matches(pattern, subject)
            for sequence in sequences
            if sequence > after
        ]
        return sorted(found, key=lambda one: one.sequence)

    def remove(self, sequence: int) -> None:
        gone = self.messages.pop(sequence, None)
        if gone is not None:
            self.size_bytes -= len(gone.data)
            del self.by_subject[gone.subject][sequence]
            if not self.by_subject[gone.subject]:
                del self.by_subject[gone.subject]

    def add(self, subject: str, data: bytes, headers: Mapping[str, str]) -> tuple[Stored, int]:
        """The new message, and the sequence of its subject's one before (0: none)."""
        before = next(reversed(self.by_subject.get(subject, {})), 0)
        self.last += 1
        added = self.messages[self.last] = Stored(self.last, subject, data, headers)
        same = self.by_subject.setdefault(subject, {})
        same[self.last] = None
        self.size_bytes += len(data)
        if 0 < self.spec.max_per_subject < len(same):
            self.remove(next(iter(same)))
        for consumer in self.consumers.values():
            consumer.ready.append(self.last)
        self.grown.set()
        return added, before


class MemoryBroker:
    """What all clients share. Set `fate` and `append_fate` at any time; both may be random."""

    def __init__(self, *, ack_wait_s: float = 30.0, timeout_s: float = 5.0) -> None:
        self.fate: Fate = normally
        self.append_fate: AppendFate = stored
        self.ack_wait_s = ack_wait_s
        self.timeout_s = timeout_s
        self.streams: dict[str, _Stream] = {}
        self.clients: dict[str, MemoryBus] = {}
        self.subscribers: list[_Subscriber] = []
        self._turn = 0

    def connect(self, name: str) -> "MemoryBus":
        client = self.clients[name] = MemoryBus(self, name)
        return client

    def partition(self, name: str) -> None:
        """Cut a client off: nothing reaches it or comes from it until `heal`."""
        self.clients[name].cut_off()

    def heal(self, name: str) -> None:
        self.clients[name].reconnected()

    def restart(self) -> None:
        """As if the server had been killed and started: memory streams are gone."""
        for name in self.clients:
            self.partition(name)
        for stream in self.streams.values():
            stream.grown.set()
        self.streams = {n: one for n, one in self.streams.items() if not one.spec.memory}
        for name in self.clients:
            self.heal(name)

    def route(self, subject: str, data: bytes, headers: Mapping[str, str], reply: str = "") -> int:
        """Deliver to every subscriber and to one of each queue group; how many that were."""
        everyone: list[_Subscriber] = []
        groups: dict[tuple[str, str], list[_Subscriber]] = {}
        for one in self.subscribers:
            if matches(one.pattern, subject) and one.client.connected:
                members = groups.setdefault((one.pattern, one.queue), [])
                (members if one.queue else everyone).append(one)
        self._turn += 1
        chosen = [members[self._turn % len(members)] for members in groups.values() if members]
        delivery = Delivery(subject, data, dict(headers), reply)
        for one in (*everyone, *chosen):
            for delay_s in self.fate(one.client.name, delivery):
                self._deliver(one, delivery, delay_s)
        return len(everyone) + len(chosen)

    def _deliver(self, to: _Subscriber, delivery: Delivery, delay_s: float) -> None:
        if delay_s <= 0:
            to.client.receive(to.mailbox, delivery)
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(delay_s, to.client.receive, to.mailbox, delivery)

    def published(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        """A core publish: subscribers get it, and so does the stream that has its subject."""
        self.route(subject, data, headers)
        for stream in self.streams.values():
            if any(matches(pattern, subject) for pattern in stream.spec.subjects):
                self.store(stream, subject, data, headers)

    def store(self, stream: _Stream, subject: str, data: bytes, headers: Mapping[str, str]) -> int:
        added, before = stream.add(subject, data, headers)
        spec = stream.spec
        if spec.republish_from and matches(spec.republish_from, subject):
            marked = {
                **headers,
                SEQUENCE_HEADER: str(added.sequence),
                LAST_SEQUENCE_HEADER: str(before),
            }
            target = _mapped(spec.republish_from, spec.republish_to, subject)
            self.route(target, data, marked)
        return added.sequence


class MemoryBus:
    """One client of a MemoryBroker: `Bus` and `Streams`."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.name = name
        self._broker = broker
        self._up = asyncio.Event()
        self._up.set()
        self._closed = False
        self._reconnects = 0
        self._dropped = 0
        self._bytes_in = self._bytes_out = 0
        self._requests = 0
        self._takes: set[tuple[str, str]] = set()
        self._outgoing: list[tuple[str, bytes, Mapping[str, str]]] = []
        self._lost_with_the_broker: dict[str, StreamSpec] = {}

    # For the broker

    def cut_off(self) -> None:
        self._up.clear()

    def reconnected(self) -> None:
        if self.connected or self._closed:
            return
        self._up.set()
        self._reconnects += 1
        for one in self._broker.subscribers:
            if one.client is self:
                one.mailbox.mark_gap()
        waiting, self._outgoing = self._outgoing, []
        for subject, data, headers in waiting:
            self._bytes_out += len(data)
            self._broker.published(subject, data, headers)

    def receive(self, mailbox: Mailbox, delivery: Delivery) -> None:
        if self.connected:
            self._bytes_in += len(delivery.data)
            self._dropped += not mailbox.put(delivery)

    # Bus

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def reconnects(self) -> int:
        return self._reconnects

    @property
    def dropped(self) -> int:
        return self._dropped

    @property
    def traffic(self) -> Traffic:
        """Of talk and appends; what is read from streams costs nothing here."""
        return Traffic(self._bytes_in, self._bytes_out)

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        if self._closed:
            raise TransientError("the connection to the broker was closed")
        if self.connected:
            self._bytes_out += len(data)
            self._broker.published(subject, data, headers or {})
            return
        if len(data) + sum(len(waiting[1]) for waiting in self._outgoing) > OUTGOING_BYTES:
            raise TransientError("not connected, and the buffer is full")
        self._outgoing.append((subject, data, headers or {}))

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        self._requests += 1
        reply = f"_INBOX.{self.name}.{self._requests}"
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready()
                async with self.subscribe(reply, limit=1) as answers:
                    self._bytes_out += len(data)
                    if not self._broker.route(subject, data, {}, reply):
                        raise TransientError(f"nobody serves {subject}")
                    answer = await anext(answers, None)
        except TimeoutError as error:
            raise TransientError(f"no answer on {subject} within {timeout_s:g} s") from error
        if answer is None:
            raise TransientError("the connection to the broker was closed")
        return answer.data

    @asynccontextmanager
    async def subscribe(
        self, subject: str, *, queue: str = "", limit: int = 4096, gaps: bool = False, each: int = 0
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        mailbox = Mailbox(limit, gaps=gaps, each=each)
        subscriber = _Subscriber(self, subject, queue, mailbox)
        if self._closed:
            mailbox.close()
        self._broker.subscribers.append(subscriber)
        try:
            yield mailbox
        finally:
            self._broker.subscribers.remove(subscriber)
            mailbox.close()

    async def flush(self) -> None:
        await self._ready()

    async def close(self) -> None:
        self._closed = True
        self._up.clear()
        for one in self._broker.subscribers:
            if one.client is self:
                one.mailbox.close()

    # Streams

    async def ensure_stream(self, spec: StreamSpec) -> None:
        await self._ready()
        if spec.memory:
            self._lost_with_the_broker[spec.name] = spec
        present = self._broker.streams.get(spec.name)
        if present is None:
            self._broker.streams[spec.name] = _Stream(spec)
        else:
            present.spec = spec

    async def append(
        self,
        subject: str,
        data: bytes,
        *,
        stream: str,
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Appended:
        target = await self._stream(stream)
        self._bytes_out += len(data)
        fate = self._broker.append_fate(subject, data)
        if fate == "lost":
            raise TransientError(f"no answer on {subject}")
        self._broker.route(subject, data, headers or {})  # as the server does, even if it refuses
        if expected_last is not None and expected_last != target.last:
            raise SequenceMismatch(f"wrong last sequence: {target.last}", target.last)
        if 0 < target.spec.max_bytes < target.size_bytes + len(data):
            raise TransientError(f"stream {stream} is full: see that its reader runs", delay_s=5.0)
        sequence = self._broker.store(target, subject, data, headers or {})
        if fate == "unanswered":
            raise TransientError(f"no answer on {subject}")
        return Appended(sequence)

    async def last_sequence(self, stream: str, subject: str = "") -> int:
        target = await self._stream(stream)
        if not subject:
            return target.last
        return max((stored.sequence for stored in target.of(subject)), default=0)

    async def get(self, stream: str, sequence: int) -> Stored | None:
        return (await self._stream(stream)).messages.get(sequence)

    async def get_last(
        self, stream: str, subject: str, *, timeout_s: float = 10.0
    ) -> Stored | None:
        found = (await self._stream(stream)).of(subject)
        return found[-1] if found else None

    async def subjects(self, stream: str, pattern: str) -> set[str]:
        return {one.subject for one in (await self._stream(stream)).of(pattern)}

    async def purge(self, stream: str, subject: str) -> int:
        target = await self._stream(stream)
        gone = target.of(subject)
        for one in gone:
            target.remove(one.sequence)
        return len(gone)

    async def read(
        self, stream: str, subject: str, *, after: int = 0, up_to: int = 0
    ) -> AsyncGenerator[Stored, None]:
        position = after
        while page := (await self._stream(stream)).of(subject, position):
            for one in page:
                if up_to and one.sequence > up_to:
                    return
                position = one.sequence
                yield one

    async def take(self, stream: str, consumer: str, *, limit: int, wait_s: float) -> Batch | None:
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            target = await self._stream(stream)
            if consumer not in target.consumers:
                target.consumers[consumer] = _Consumer(deque(target.messages))
            queue = target.consumers[consumer]
            if (stream, consumer) not in self._takes:
                self._takes.add((stream, consumer))
                queue.again()
            now = asyncio.get_running_loop().time()
            for sequence in [s for s, due in queue.pending.items() if due <= now]:
                del queue.pending[sequence]
                queue.ready.append(sequence)
            taken: list[Stored] = []
            while queue.ready and len(taken) < limit:
                sequence = queue.ready.popleft()
                if sequence in target.messages:
                    queue.pending[sequence] = now + self._broker.ack_wait_s
                    taken.append(target.messages[sequence])
            if taken:
                return _Taken(self, target, queue, taken)
            if now >= deadline:
                return None
            target.grown.clear()
            due = min([deadline, *queue.pending.values()])
            try:
                async with asyncio.timeout_at(due):
                    await target.grown.wait()
            except TimeoutError:
                continue

    async def _ready(self) -> None:
        if not self._closed:
            try:
                async with asyncio.timeout(self._broker.timeout_s):
                    await self._up.wait()
            except TimeoutError as error:
                raise TransientError("not connected to the broker") from error
        if self._closed:
            raise TransientError("the connection to the broker was closed")

    async def _stream(self, name: str) -> _Stream:
        await self._ready()
        if name not in self._broker.streams:
            spec = self._lost_with_the_broker.get(name)
            if spec is None:
                raise TransientError(f"the broker has no stream {name}: start the aggregator")
            self._broker.streams[name] = _Stream(spec)
        return self._broker.streams[name]


class _Taken:
    """Messages taken by a consumer of one stream; a word of a client cut off is lost."""

    def __init__(
        self, client: MemoryBus, stream: _Stream, consumer: _Consumer, messages: list[Stored]
    ) -> None:
        self._client = client
        self._stream = stream
        self._consumer = consumer
        self._messages = messages

    @property
    def messages(self) -> Sequence[Stored]:
        return self._messages

    async def done(self) -> None:
        if not self._client.connected:
            return
        for one in self._messages:
            self._consumer.pending.pop(one.sequence, None)
            if self._stream.spec.work_queue:
                self._stream.remove(one.sequence)

    async def again(self, delay_s: float) -> None:
        if not self._client.connected:
            return
        due = asyncio.get_running_loop().time() + delay_s
        for one in self._messages:
            if one.sequence in self._consumer.pending:
                self._consumer.pending[one.sequence] = due
        self._stream.grown.set()


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> re.Pattern[str]:
    tokens = [r"([^.]+)" if one == "*" else re.escape(one) for one in pattern.split(".")]
    if tokens[-1] == ">":
        tokens[-1] = r"(.+)"
    return re.compile(r"\.".join(tokens))


def matches(pattern: str, subject: str) -> bool:
    """Whether a NATS subject pattern (`*` one token, a last `>` the rest) holds the subject."""
    return pattern == subject or _pattern(pattern).fullmatch(subject) is not None


def _mapped(source: str, target: str, subject: str) -> str:
    """`target` with each `{{wildcard(n)}}` replaced by what the n-th `*` of `source` holds."""
    found = _pattern(source).fullmatch(subject)
    values = found.groups() if found else ()
    return re.sub(r"\{\{wildcard\((\d+)\)\}\}", lambda one: values[int(one[1]) - 1], target)
