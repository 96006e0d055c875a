"""The job log as everyone reads and follows it; one process writes it, by `log_writer`.

A follower sees history and then what happens, in order, without gaps or repeats, over a broker
that drops, repeats and restarts. Knows nothing of what the events mean.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from shared import subjects
from shared.bus import (
    GAP,
    LAST_SEQUENCE_HEADER,
    PENDING_HEADER,
    SEQUENCE_HEADER,
    Bus,
    Delivery,
    Stored,
    Streams,
    StreamSpec,
)
from shared.clock import backoff_s
from shared.codec import decode
from shared.errors import MalformedMessage, TransientError
from shared.logs import get
from shared.messages import DetailEvent, LogEvent, Message, WriterStarted
from shared.patience import patiently

Event = LogEvent | DetailEvent
Kind = TypeVar("Kind")

UPDATES_BYTES = 256 * 1024 * 1024
UPDATES_EACH = 256
"""Of one device and job; the oldest make room. A device sends again what it hears nothing of."""
REPORTS_BYTES = 64 * 1024 * 1024
REPORTS_AGE_S = 2250.0
"""A device that has been silent for so long is not called any more."""

STREAMS = (
    StreamSpec(
        subjects.LOG_STREAM,
        (subjects.ALL_LOGS,),
        republish_from=subjects.ALL_LOGS,
        republish_to=subjects.events("{{wildcard(1)}}"),
    ),
    StreamSpec(subjects.DETAIL_STREAM, (subjects.ALL_DETAILS,)),
    StreamSpec(
        subjects.UPDATES_STREAM,
        (subjects.ALL_UPDATES,),
        memory=True,
        work_queue=True,
        max_bytes=UPDATES_BYTES,
        max_per_subject=UPDATES_EACH,
        silent=True,
    ),
    StreamSpec(subjects.BLOBS_STREAM, (subjects.ALL_BLOBS,), max_per_subject=1),
    StreamSpec(
        subjects.REPORTS_STREAM,
        (subjects.ALL_REPORTS,),
        memory=True,
        max_per_subject=1,
        max_bytes=REPORTS_BYTES,
        max_age_s=REPORTS_AGE_S,
        silent=True,
    ),
)
"""An update is on its device's disk until it is settled, so UPDATES may live in memory. REPORTS has
each device's newest word for a scheduler that was restarted: an idle fleet says nothing. Who loses
it with the broker hears the devices themselves, whose links are new then.
"""

declined: Counter[str] = Counter()
"""Entries skipped since this process started because they do not decode, by stream."""

_AGAIN_S = (0.01, 0.1, 0.5)
_LAGS_S = (*_AGAIN_S, 2.0, 5.0, 10.0)
"""For what is known to be stored: a server that was cut off needs seconds to catch up."""

_log = get("log")


async def ensure_streams(streams: Streams, replicas: int = 1) -> None:
    """The streams are there, as they should be; waits for the broker for as long as needed.

    Each has `replicas` copies, or more where an operator gave it more.

    Raises:
        ConfigError: the broker refuses one; the text says what to change.
    """
    for wanted in [replace(spec, replicas=replicas) for spec in STREAMS]:

        async def ensure(spec: StreamSpec = wanted) -> None:
            await streams.ensure_stream(spec)

        await patiently(ensure, "ensure_stream")


async def read(
    streams: Streams, stream: str, subject: str, after: int = 0
) -> AsyncGenerator[tuple[int, Event], None]:
    """What is stored now beyond `after`, in order, with its sequence; the undecodable is skipped.

    Raises:
        TransientError: the broker did not answer; go on after the last sequence got.
    """
    async with aclosing(streams.read(stream, subject, after=after)) as pages:
        async for stored in pages:
            event = _decoded(stream, stored.sequence, stored.data, _event)
            if event is not None:
                yield stored.sequence, event


async def read_patiently(
    streams: Streams, stream: str, subject: str, after: int = 0, up_to: int = 0
) -> AsyncGenerator[tuple[int, Event], None]:
    """As `read`, for as long as the world fails it: it goes on after the last sequence got.

    `up_to` is a sequence that is there, of the subject: a replica may not have it yet, and is
    asked again until it has.
    """
    attempt = 0
    while True:
        try:
            async with aclosing(streams.read(stream, subject, after=after)) as pages:
                async for stored in pages:
                    after, attempt = stored.sequence, 0
                    event = _decoded(stream, after, stored.data, _event)
                    if event is not None:
                        yield after, event
        except TransientError as error:
            why = str(error)
        else:
            if after >= up_to:
                return
            why = f"a replica of the broker has {stream} up to {after} of {up_to}"
        _log.warning("broker_call_failed", call="read", why=why)
        await asyncio.sleep(backoff_s(attempt, first_s=0.05, cap_s=5.0))
        attempt += 1


@dataclass(frozen=True, slots=True)
class _Source(Generic[Kind]):
    """Where events are stored and where the broker says live that there are more.

    `live` carries the republished events, with their sequences; where it is `stored` itself, each
    of its messages is a mere hint (the broker may have refused it).
    """

    stream: str
    stored: str
    live: str
    narrowed: Callable[[Message], Kind]

    def sequences(self, news: Delivery) -> tuple[int, int]:
        """The stream sequence of a republished event, and that of the one before; (0, 0): none.

        The header names the one before of the same subject; over all subjects it is the one less.
        """
        if PENDING_HEADER in news.headers:
            return 0, 0
        try:
            sequence = int(news.headers[SEQUENCE_HEADER])
            before = int(news.headers[LAST_SEQUENCE_HEADER])
        except (KeyError, ValueError):
            return 0, 0
        return sequence, sequence - 1 if self.live.endswith("*") else before


def follow(
    bus: Bus, streams: Streams, job: str, after: int = 0, *, check_s: float | None = None
) -> AsyncGenerator[tuple[int, LogEvent], None]:
    """One job's facts beyond `after`, old and then new, for as long as the bus is open.

    `check_s`: how long it may be silent before the log itself is looked at, in case its very last
    event was lost; a look costs about 300 bytes. None: after reconnects only.
    """
    source = _Source(subjects.LOG_STREAM, subjects.log(job), subjects.events(job), _log_event)
    return _follow(bus, streams, source, after, check_s)


def follow_all(
    bus: Bus, streams: Streams, after: int = 0, *, check_s: float | None = 30.0
) -> AsyncGenerator[tuple[int, LogEvent], None]:
    """Every job's facts beyond `after` in the order of the stream, old and then new."""
    source = _Source(subjects.LOG_STREAM, subjects.ALL_LOGS, subjects.ALL_EVENTS, _log_event)
    return _follow(bus, streams, source, after, check_s)


def follow_detail(
    bus: Bus, streams: Streams, after: int = 0, *, check_s: float | None = 5.0
) -> AsyncGenerator[tuple[int, DetailEvent], None]:
    """Every job's private facts beyond `after` in the order of the stream, old and then new."""
    details = subjects.ALL_DETAILS
    source = _Source(subjects.DETAIL_STREAM, details, details, _detail_event)
    return _follow(bus, streams, source, after, check_s)


async def _follow(
    bus: Bus,
    streams: Streams,
    source: _Source[Kind],
    after: int,
    check_s: float | None,
) -> AsyncGenerator[tuple[int, Kind], None]:
    position = after
    async with bus.subscribe(source.live, gaps=True) as live:
        news: Delivery | None = GAP  # at first, all of history may be missing
        while news is not None:
            sequence, before = source.sequences(news)
            if before <= position < sequence:
                position = sequence
                event = _decoded(source.stream, sequence, news.data, source.narrowed)
                if event is not None:
                    yield sequence, event
            elif news is GAP or sequence > position or source.live == source.stored:
                wanted = sequence if news is GAP or sequence else position + 1
                async with aclosing(_catch_up(streams, source, position, wanted)) as missing:
                    async for stored in missing:
                        position = stored.sequence
                        event = _decoded(source.stream, position, stored.data, source.narrowed)
                        if event is not None:
                            yield position, event
            news = await _next(live, check_s)
            while source.live == source.stored and news not in (None, GAP):
                hint, news = news, await _next(live, 0.0)
                if news is GAP:
                    news = hint
                    break


async def _next(live: AsyncIterator[Delivery], wait_s: float | None) -> Delivery | None:
    """The next delivery, None at the end, GAP after `wait_s` without one."""
    try:
        async with asyncio.timeout(wait_s):
            return await anext(live, None)
    except TimeoutError:
        return GAP


async def _catch_up(
    streams: Streams, source: _Source[Kind], after: int, wanted: int
) -> AsyncGenerator[Stored, None]:
    """What is stored beyond `after`, read again for a while if `wanted` is not there yet.

    It may not be: a replica of the broker lags behind, or a hint came before what it hints at.
    """
    position, attempt = after, 0
    patience = _AGAIN_S if source.live == source.stored else _LAGS_S
    while True:
        try:
            pages = streams.read(source.stream, source.stored, after=position)
            async with aclosing(pages):
                async for stored in pages:
                    position, attempt = stored.sequence, 0
                    yield stored
        except TransientError as error:
            _log.debug("log_unreadable", stream=source.stream, after=position, why=str(error))
            await asyncio.sleep(backoff_s(attempt, cap_s=2.0))
        else:
            if position >= wanted or attempt >= len(patience):
                return
            await asyncio.sleep(patience[attempt])
        attempt += 1


def _decoded(
    stream: str, sequence: int, data: bytes, narrowed: Callable[[Message], Kind]
) -> Kind | None:
    """The event; None for what is not of any job, or of a kind that this version does not know."""
    try:
        message = decode(data, Message)
        return None if isinstance(message, WriterStarted) else narrowed(message)
    except MalformedMessage as error:
        declined[stream] += 1
        _log.warning("log_entry_declined", stream=stream, sequence=sequence, why=str(error))
        return None


def _event(message: Message) -> Event:
    if not isinstance(message, LogEvent | DetailEvent):
        raise MalformedMessage(f"a {type(message).__name__} in a log")
    return message


def _log_event(message: Message) -> LogEvent:
    if not isinstance(message, LogEvent):
        raise MalformedMessage(f"a {type(message).__name__} in the public log")
    return message


def _detail_event(message: Message) -> DetailEvent:
    if not isinstance(message, DetailEvent):
        raise MalformedMessage(f"a {type(message).__name__} among the details")
    return message
