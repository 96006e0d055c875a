"""Streams of a NATS server by its JSON API, over any connection that can ask and be answered.

nats-py is not needed for it: its pull subscriptions die with the server (nats.py issue 504) and it
has no batched Direct Get (ADR-31). Knows neither sockets nor what the messages mean.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager

from shared.bus import Appended, Batch, Delivery, SequenceMismatch, Stored, StreamSpec
from shared.errors import ConfigError, TransientError
from shared.jetstream_api import (
    NO_MESSAGE,
    NO_PEERS,
    NO_STREAM,
    WRONG_LAST_SEQUENCE,
    Answer,
    NoAnswer,
    NoResponders,
    absent,
    ack_sequence,
    answer_from,
    failed,
    is_last_batch,
    own_headers,
    packed,
    refused,
    stored_from,
    stream_config,
    unanswered,
    unless_failed,
)
from shared.mailbox import Mailbox

API = "$JS.API"
READ_MESSAGES = 256
READ_BYTES = 256 * 1024
READ_TRIES = 4
PEERS_TRIES = 30
"""Seconds that a cluster's servers are waited for."""


class _Pull:
    """Where a durable consumer delivers to; anew after every loss of the connection."""

    def __init__(self, next_subject: str, inbox: str, mailbox: Mailbox) -> None:
        self.next_subject = next_subject
        self.inbox = inbox
        self.mailbox = mailbox
        self.requests = 0


class JetStream(ABC):
    """`Streams` for whoever adds the four ways to talk; a base so that one object is a `Link`."""

    def __init__(self, *, timeout_s: float, ack_wait_s: float) -> None:
        self._timeout_s = timeout_s
        self._ack_wait_s = ack_wait_s
        self._lost_with_the_broker: dict[str, StreamSpec] = {}
        self._pulls: dict[tuple[str, str], _Pull] = {}

    @abstractmethod
    async def send(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Send one message now, or raise TransientError: nothing is kept for later."""

    @abstractmethod
    async def ask(
        self,
        subject: str,
        data: bytes,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Delivery:
        """The one answer to one request, or NoResponders, or another TransientError."""

    @abstractmethod
    def replies(self, limit: int) -> AbstractContextManager[tuple[str, Mailbox]]:
        """A reply subject and what arrives on it; closed when the connection is lost."""

    @abstractmethod
    async def open_inbox(self, limit: int) -> tuple[str, Mailbox]:
        """A prefix of reply subjects, and what arrives there under *any* subject; closed alike."""

    # The streams themselves

    async def ensure_stream(self, spec: StreamSpec) -> None:
        wanted = stream_config(spec)
        if spec.memory:
            self._lost_with_the_broker[spec.name] = spec
        info = await self._call(f"STREAM.INFO.{spec.name}")
        if info.error is not None and info.error.err_code == NO_STREAM:
            made = await self._placed(f"STREAM.CREATE.{spec.name}", wanted)
            if made.error is not None:
                raise refused(spec.name, "made", made.error)
            return
        if info.error is not None:
            raise failed(spec.name, info.error)
        copies = info.config.get("num_replicas")
        if isinstance(copies, int) and copies > spec.replicas:
            wanted["num_replicas"] = copies  # an operator has raised it
        if all(info.config.get(key) == value for key, value in wanted.items()):
            return
        changed = {**info.config, **wanted}
        updated = await self._placed(f"STREAM.UPDATE.{spec.name}", changed)
        if updated.error is not None:
            raise refused(spec.name, "changed", updated.error)

    async def _placed(self, name: str, config: Mapping[str, object]) -> Answer:
        """The answer to a call that needs servers for a stream's copies: they may be starting."""
        for _ in range(PEERS_TRIES):
            answer = await self._call(name, config)
            if answer.error is None or answer.error.err_code != NO_PEERS:
                return answer
            await asyncio.sleep(1)
        return await self._call(name, config)

    async def last_sequence(self, stream: str, subject: str = "") -> int:
        if subject:
            found = await self._call(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject})
            if found.error is not None and found.error.err_code == NO_MESSAGE:
                return 0
            message = unless_failed(stream, found).message
            return message.seq if message else 0
        info = unless_failed(stream, await self._call(f"STREAM.INFO.{stream}"))
        if info.cluster is not None and info.cluster.replicas and not info.cluster.leader:
            raise TransientError(f"stream {stream} has no leader: most of its servers must run")
        return info.state.last_seq if info.state else 0

    async def subjects(self, stream: str, pattern: str) -> set[str]:
        found: set[str] = set()
        while True:
            request = {"subjects_filter": pattern, "offset": len(found)}
            info = unless_failed(stream, await self._call(f"STREAM.INFO.{stream}", request))
            page = (info.state.subjects if info.state else None) or {}
            found.update(page)
            if not page or len(found) >= info.total:
                return found

    async def purge(self, stream: str, subject: str) -> int:
        request = {"filter": subject}
        return unless_failed(stream, await self._call(f"STREAM.PURGE.{stream}", request)).purged

    async def append(
        self,
        subject: str,
        data: bytes,
        *,
        stream: str,
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Appended:
        sent = dict(headers or {})
        if expected_last is not None:
            sent["Nats-Expected-Last-Sequence"] = str(expected_last)
        try:
            reply = await self.ask(subject, data, timeout_s=self._timeout_s, headers=sent or None)
        except NoResponders as error:
            if not await self._remade(stream):
                raise absent(stream) from error
            reply = await self.ask(subject, data, timeout_s=self._timeout_s, headers=sent or None)
        except NoAnswer as error:
            raise unanswered(stream, error) from error
        answer = answer_from(reply)
        if answer.error is not None and answer.error.err_code in WRONG_LAST_SEQUENCE:
            text = answer.error.description
            digits = text.rsplit(" ", 1)[-1]
            raise SequenceMismatch(text, int(digits) if digits.isdigit() else -1)
        unless_failed(stream, answer)
        if answer.stream != stream:
            raise ConfigError(
                f"subject {subject} is stored in stream {answer.stream}, not in {stream}: "
                f"delete the stream {answer.stream} of this broker or use another broker"
            )
        return Appended(answer.seq)

    # Direct Get

    async def get(self, stream: str, sequence: int) -> Stored | None:
        request = packed({"seq": sequence})
        return await self._direct(stream, f"{API}.DIRECT.GET.{stream}", request, self._timeout_s)

    async def get_last(
        self, stream: str, subject: str, *, timeout_s: float = 10.0
    ) -> Stored | None:
        return await self._direct(stream, f"{API}.DIRECT.GET.{stream}.{subject}", b"", timeout_s)

    async def _direct(
        self, stream: str, subject: str, request: bytes, timeout_s: float
    ) -> Stored | None:
        try:
            reply = await self.ask(subject, request, timeout_s=timeout_s)
        except NoResponders as error:
            raise absent(stream) from error
        match reply.headers.get("Status", ""):
            case "":
                return stored_from(reply)
            case "404":
                return None
            case status:
                raise TransientError(f"a Direct Get from stream {stream} was answered {status}")

    async def read(
        self, stream: str, subject: str, *, after: int = 0, up_to: int = 0
    ) -> AsyncGenerator[Stored, None]:
        position, failures = after, 0
        while not up_to or position < up_to:
            before, at_end = position, False
            request = {
                "seq": position + 1,
                "next_by_subj": subject,
                "batch": min(READ_MESSAGES, up_to - position) if up_to else READ_MESSAGES,
                "max_bytes": READ_BYTES,
            }
            # Slow links: each failure doubles the patience, as what was asked for is still coming.
            patience_s = self._timeout_s * 2**failures
            with self.replies(READ_MESSAGES + 1) as (reply, mailbox):
                try:
                    await self.send(f"{API}.DIRECT.GET.{stream}", packed(request), reply=reply)
                    while True:
                        async with asyncio.timeout(patience_s):
                            delivery = await anext(mailbox)
                        status = delivery.headers.get("Status", "")
                        if status:
                            at_end = is_last_batch(stream, status, delivery)
                            break
                        stored = stored_from(delivery)
                        if up_to and stored.sequence > up_to:
                            return
                        position = stored.sequence
                        yield stored
                except (TimeoutError, StopAsyncIteration, TransientError) as error:
                    if isinstance(error, NoResponders):
                        raise
                    cause: Exception | None = error
                else:
                    cause = None
            if at_end:
                return
            failures = 0 if position > before else failures + 1
            if failures >= READ_TRIES:
                raise TransientError(
                    f"stream {stream} did not answer beyond sequence {position}: "
                    "is the broker reachable?"
                ) from cause
            if cause is not None and failures:
                await asyncio.sleep(0.1 * 2**failures)

    # The work queue

    async def take(self, stream: str, consumer: str, *, limit: int, wait_s: float) -> Batch | None:
        pull = await self._pull(stream, consumer)
        now: dict[str, object] = {"no_wait": True}
        found = await self._fetch(pull, limit, now, self._timeout_s)
        if not found and wait_s > 0:
            waiting: dict[str, object] = {"expires": int(wait_s * 1e9)}
            found = await self._fetch(pull, 1, waiting, wait_s + self._timeout_s)
            if found and limit > 1:
                found += await self._fetch(pull, limit - 1, now, self._timeout_s, in_hand=True)
        return _Taken(self, found) if found else None

    async def _pull(self, stream: str, consumer: str) -> _Pull:
        """The consumer's inbox; consumer and inbox are made where they are missing."""
        pull = self._pulls.get((stream, consumer))
        if pull is not None and not pull.mailbox.closed:
            return pull
        if pull is None:
            # What a process before this one left unacknowledged comes at once to a new consumer.
            await self._call(f"CONSUMER.DELETE.{stream}.{consumer}")
        config: dict[str, object] = {
            "name": consumer,
            "durable_name": consumer,
            "deliver_policy": "all",
            "replay_policy": "instant",
            "ack_policy": "explicit",
            "ack_wait": int(self._ack_wait_s * 1e9),
            "max_ack_pending": 100_000,
        }
        request: dict[str, object] = {"stream_name": stream, "config": config}
        made = await self._call(f"CONSUMER.CREATE.{stream}.{consumer}", request)
        if made.error is not None and made.error.err_code == NO_STREAM:
            if not await self._remade(stream):
                raise absent(stream)
            made = await self._call(f"CONSUMER.CREATE.{stream}.{consumer}", request)
        unless_failed(stream, made)
        inbox, mailbox = await self.open_inbox(100_000)
        pull = _Pull(f"{API}.CONSUMER.MSG.NEXT.{stream}.{consumer}", inbox, mailbox)
        self._pulls[stream, consumer] = pull
        return pull

    async def _fetch(
        self,
        pull: _Pull,
        count: int,
        request: dict[str, object],
        timeout_s: float,
        *,
        in_hand: bool = False,
    ) -> list[Delivery]:
        """Up to `count` messages; without any, and nothing `in_hand`, a failure is an error."""
        pull.requests += 1
        reply = f"{pull.inbox}.{pull.requests}"
        found: list[Delivery] = []
        try:
            await self.send(pull.next_subject, packed({"batch": count, **request}), reply=reply)
            async with asyncio.timeout(timeout_s):
                while len(found) < count:
                    delivery = await anext(pull.mailbox)
                    status = delivery.headers.get("Status", "")
                    if not delivery.subject.startswith(pull.inbox):
                        found.append(delivery)
                    elif delivery.subject != reply or status == "100":
                        continue  # of a request before this one, or a heartbeat
                    elif status in ("404", "408"):
                        break
                    else:
                        raise TransientError(
                            f"a pull was answered {status} {delivery.headers.get('Description')}"
                        )
        except (TimeoutError, StopAsyncIteration, TransientError) as error:
            pull.mailbox.close()  # the next call makes what is missing
            if not found and not in_hand:
                if isinstance(error, TransientError):
                    raise
                raise TransientError("no answer to a pull: is the broker reachable?") from error
        return found

    async def _remade(self, stream: str) -> bool:
        """Make a stream again that went with the memory of a restarted broker."""
        spec = self._lost_with_the_broker.get(stream)
        if spec is None:
            return False
        await self.ensure_stream(spec)
        return True

    async def _call(self, name: str, request: Mapping[str, object] | None = None) -> Answer:
        body = b"" if request is None else packed(request)
        try:
            return answer_from(await self.ask(f"{API}.{name}", body, timeout_s=self._timeout_s))
        except NoResponders as error:
            raise TransientError(
                "the broker has no JetStream (yet): start nats-server with a `jetstream` block"
            ) from error


class _Taken:
    """Messages of a pull with the subjects that acknowledge them."""

    def __init__(self, streams: JetStream, deliveries: Sequence[Delivery]) -> None:
        self._streams = streams
        self._acks = [delivery.reply for delivery in deliveries]
        self._messages = [
            Stored(ack_sequence(one.reply), one.subject, one.data, own_headers(one.headers))
            for one in deliveries
        ]

    @property
    def messages(self) -> Sequence[Stored]:
        return self._messages

    async def done(self) -> None:
        await self._settle(b"+ACK")

    async def again(self, delay_s: float) -> None:
        await self._settle(b"-NAK " + packed({"delay": int(delay_s * 1e9)}))

    async def _settle(self, word: bytes) -> None:
        for ack in self._acks:
            try:
                await self._streams.send(ack, word)
            except TransientError:
                return  # they are delivered again, as after a lost acknowledgement
