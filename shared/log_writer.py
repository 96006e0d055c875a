"""The one way to write the job log: by a single process, which knows when it is that no more.

Knows nothing of what the events mean.
"""

import asyncio
import random
import time

from shared import subjects
from shared.bus import SequenceMismatch, Stored, Streams
from shared.clock import backoff_s
from shared.codec import decode, encode
from shared.errors import Fenced, MalformedMessage, TransientError
from shared.logs import get
from shared.messages import DetailEvent, LogEvent, Message, WriterStarted
from shared.metrics import Counters
from shared.patience import patiently

BEHIND_S = 60.0
"""A server cut off from its cluster answers from before until it knows: for up to some 20 s."""

_SUBJECTS = {subjects.LOG_STREAM: subjects.log, subjects.DETAIL_STREAM: subjects.detail}

_log = get("log")


class LogWriter:
    """Appends to one stream as its only writer.

    `last` is the stream's last sequence that this process has taken into account: open the writer,
    or claim the stream, first and replay the log after it, so that whatever another process adds
    fences this one off.
    """

    def __init__(
        self, streams: Streams, stream: str, *, last: int, counters: Counters | None = None
    ) -> None:
        """`counters` counts appends that failed."""
        self._streams = streams
        self._stream = stream
        self._subject_of = _SUBJECTS[stream]
        self._counters = counters or Counters()
        self.last = last
        self.problem = ""
        """Why nothing can be appended now."""

    @classmethod
    async def open(
        cls, streams: Streams, stream: str, counters: Counters | None = None
    ) -> "LogWriter":
        """A writer at the present end of the stream."""

        async def last() -> int:
            return await streams.last_sequence(stream)

        present = await patiently(last, "last_sequence")
        return cls(streams, stream, last=present, counters=counters)

    async def claim(self) -> None:
        """Whoever wrote to the stream before can write no more; `last` is where that was said.

        Who writes to two streams claims both before it reads either: else one process might go on
        in the first of them and another in the second, and neither know what both have logged.
        """
        name = f"{random.getrandbits(64):016x}"
        subject, data = self._subject_of(subjects.WRITER), encode(WriterStarted(writer=name))
        attempt = 0
        while True:
            try:
                appended = await self._streams.append(
                    subject, data, stream=self._stream, expected_last=self.last
                )
            except SequenceMismatch:
                if attempt and await self._is_ours(subject, data):
                    self.last += 1
                    return
                before, self.last = self.last, (await self.open(self._streams, self._stream)).last
                if self.last == before:  # a server that is cut off says one thing and another
                    await asyncio.sleep(backoff_s(attempt, first_s=0.05, cap_s=5.0))
                    attempt += 1
            except TransientError as error:
                _log.warning("claim_unanswered", stream=self._stream, why=str(error))
                await asyncio.sleep(backoff_s(attempt, first_s=0.05, cap_s=5.0))
                attempt += 1
            else:
                self.last = appended.sequence
                return

    async def append(self, job: str, event: LogEvent | DetailEvent) -> int:
        """The sequence of `event`, stored once, however often the broker fails meanwhile.

        Raises:
            Fenced: another process has written to the stream.
        """
        subject, data = self._subject_of(job), encode(event)
        try:
            decode(data, Message)
        except MalformedMessage as error:  # ours: every reader would skip what is logged for ever
            raise ValueError(f"{type(event).__name__} has no place in the log: {error}") from error
        attempt, behind = 0, _Behind()
        while True:
            try:
                appended = await self._streams.append(
                    subject, data, stream=self._stream, expected_last=self.last
                )
            except SequenceMismatch as mismatch:
                if 0 <= mismatch.last < self.last:
                    if behind.for_good():
                        raise self._fenced(mismatch.last) from mismatch
                    why = f"the broker answers from before {self.last}: {mismatch.last}"
                elif mismatch.last > self.last and not attempt:
                    raise self._fenced(mismatch.last) from mismatch
                elif (ours := await self._is_ours(subject, data)) is None:
                    why = "a replica of the broker lags behind its log"
                elif not ours:
                    raise self._fenced(mismatch.last) from mismatch
                else:
                    self.last, self.problem = self.last + 1, ""
                    return self.last
            except TransientError as error:
                why = str(error)
            else:
                self.last, self.problem = appended.sequence, ""
                return self.last
            self.problem = why
            self._counters.add("appends_failed")
            _log.warning("append_failed", stream=self._stream, why=why)
            await asyncio.sleep(backoff_s(attempt, first_s=0.05, cap_s=5.0))
            attempt += 1

    async def check(self) -> None:
        """Nobody else has written to the stream.

        Raises:
            Fenced: another process has.
        """

        behind = _Behind()

        async def last() -> int:
            found = await self._streams.last_sequence(self._stream)
            if found < self.last and not behind.for_good():
                raise TransientError(f"the broker answers from before {self.last}: {found}")
            return found

        found = await patiently(last, "last_sequence")
        if found != self.last:
            raise self._fenced(found)

    async def _is_ours(self, subject: str, data: bytes) -> bool | None:
        """Whether an append without an answer has landed: the next entry is it, to the bit.

        None where the next entry is not to be had: a replica lags, or it was never agreed on.
        """

        async def get() -> Stored | None:
            return await self._streams.get(self._stream, self.last + 1)

        found = await patiently(get, "get")
        return found and found.subject == subject and found.data == data

    def _fenced(self, last: int) -> Fenced:
        if 0 <= last < self.last:
            return Fenced(
                f"stream {self._stream} ends at {last}, but this process has written up to "
                f"{self.last}: the broker has lost entries (another store directory, or a "
                "backup?); give it its store back, or start the aggregator anew on what is left"
            )
        return Fenced(
            f"another aggregator writes to stream {self._stream} (it is at {last}, this one at "
            f"{self.last}): stop one of them, then start the other again"
        )


class _Behind:
    """Tells a server that lags from a store that has lost entries: by how long it goes on."""

    def __init__(self) -> None:
        self._since: float | None = None

    def for_good(self) -> bool:
        """Whether this, asked when it was seen to be behind, has gone on for too long."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now - self._since >= BEHIND_S
