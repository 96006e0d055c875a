"""One process's link to the broker: every call is a boundary to be killed at, and may be failed."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol

from shared.bus import Appended, Batch, Delivery, Stored, StreamSpec, Traffic
from shared.errors import TransientError
from tests.chaos.brokers import ChaosClient

PATIENT = 12
"""An idle `take` waits so many times longer: hours of polling an empty queue show nothing."""


class Weather(Protocol):
    """What may happen to a message of a client on its way."""

    def latency_s(self, client: str) -> float: ...

    def copies(self, client: str) -> list[float]:
        """After how many seconds each copy of a published message arrives."""
        ...

    def fails(self, client: str) -> bool:
        """Whether the broker leaves this call unanswered."""
        ...

    def loses_ack(self, client: str) -> bool: ...


class Steps(Protocol):
    """The process at the link's end."""

    name: str

    def step(self, what: str) -> None:
        """Pass a boundary; raises Killed where the process ends there."""
        ...


class ChaosLink:
    """`Link` over a client of the broker in memory."""

    def __init__(self, inner: ChaosClient, process: Steps, weather: Weather) -> None:
        self.inner = inner
        self._process = process
        self._weather = weather

    # Bus

    @property
    def connected(self) -> bool:
        return self.inner.connected

    @property
    def reconnects(self) -> int:
        return self.inner.reconnects

    @property
    def dropped(self) -> int:
        return self.inner.dropped

    @property
    def traffic(self) -> Traffic:
        return self.inner.traffic

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        what = "reply" if subject.startswith("_INBOX.") else subject.split(".")[2]
        self._process.step(f"publish {what}")
        loop = asyncio.get_running_loop()
        for after_s in self._weather.copies(self._process.name):
            if after_s <= 0:
                await self.inner.publish(subject, data, headers)
            elif self.inner.connected:
                loop.call_later(after_s, self._arrive, subject, data, headers or {})
        self._process.step(f"published {what}")

    def _arrive(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        """A message that was under way is at the broker, whatever its sender has come to."""
        self.inner.broker.published(subject, data, headers)

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        self._process.step("request")
        answer = await self.inner.request(subject, data, timeout_s=timeout_s)
        self._process.step("answered")
        return answer

    def subscribe(
        self, subject: str, *, queue: str = "", limit: int = 4096, gaps: bool = False, each: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self.inner.subscribe(subject, queue=queue, limit=limit, gaps=gaps, each=each)

    async def flush(self) -> None:
        await self.inner.flush()

    async def close(self) -> None:
        await self.inner.close()

    # Streams

    async def ensure_stream(self, spec: StreamSpec) -> None:
        await self._there()
        await self.inner.ensure_stream(spec)

    async def append(
        self,
        subject: str,
        data: bytes,
        *,
        stream: str,
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Appended:
        self._process.step(f"append {stream}")
        await self._there()
        appended = await self.inner.append(
            subject, data, stream=stream, expected_last=expected_last, headers=headers
        )
        self._process.step(f"appended {stream}")
        await self._back()
        return appended

    async def last_sequence(self, stream: str, subject: str = "") -> int:
        await self._there()
        found = await self.inner.last_sequence(stream, subject)
        await self._back()
        return found

    async def get(self, stream: str, sequence: int) -> Stored | None:
        await self._there()
        return await self.inner.get(stream, sequence)

    async def get_last(
        self, stream: str, subject: str, *, timeout_s: float = 10.0
    ) -> Stored | None:
        await self._there()
        return await self.inner.get_last(stream, subject, timeout_s=timeout_s)

    async def subjects(self, stream: str, pattern: str) -> set[str]:
        await self._there()
        return await self.inner.subjects(stream, pattern)

    async def purge(self, stream: str, subject: str) -> int:
        self._process.step("purge")
        await self._there()
        return await self.inner.purge(stream, subject)

    async def read(
        self, stream: str, subject: str, *, after: int = 0, up_to: int = 0
    ) -> AsyncGenerator[Stored, None]:
        await self._there()
        pages = self.inner.read(stream, subject, after=after, up_to=up_to)
        async with aclosing(pages):
            async for stored in pages:
                yield stored
                if self._weather.fails(self._process.name):
                    raise TransientError("a read broke off")

    async def take(self, stream: str, consumer: str, *, limit: int, wait_s: float) -> Batch | None:
        batch = await self.inner.take(stream, consumer, limit=limit, wait_s=PATIENT * wait_s)
        self._process.step("taken")
        await self._back()
        return None if batch is None else _Taken(batch, self)

    # Under way

    async def _there(self) -> None:
        await asyncio.sleep(self._weather.latency_s(self._process.name))
        if self._weather.fails(self._process.name):
            raise TransientError("no answer")

    async def _back(self) -> None:
        """The answer is under way; a link that is cut meanwhile loses it."""
        await asyncio.sleep(self._weather.latency_s(self._process.name))
        if not self.inner.connected or self._weather.fails(self._process.name):
            raise TransientError("the answer was lost")

    async def acknowledge(self, batch: Batch) -> None:
        self._process.step("acknowledge")
        if not self._weather.loses_ack(self._process.name):
            await batch.done()
        self._process.step("acknowledged")


class _Taken:
    """A batch whose acknowledgement may get lost."""

    def __init__(self, batch: Batch, link: ChaosLink) -> None:
        self._batch = batch
        self._link = link

    @property
    def messages(self) -> Sequence[Stored]:
        return self._batch.messages

    async def done(self) -> None:
        await self._link.acknowledge(self._batch)

    async def again(self, delay_s: float) -> None:
        await self._batch.again(delay_s)
