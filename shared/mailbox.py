"""A bounded queue of deliveries with one reader: what both buses put behind `subscribe`."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from shared.bus import GAP, Delivery


class Mailbox(AsyncIterator[Delivery]):
    """Keeps up to `limit` deliveries; one more is refused. Iteration ends when it is closed.

    With `gaps`, the reader gets GAP at every place where something may be missing. With `each`, no
    more than so many of one subject wait, so that one sender leaves the others their room.
    """

    def __init__(self, limit: int, *, gaps: bool = False, each: int = 0) -> None:
        self._limit = limit
        self._each = each
        self._of_subject: dict[str, int] = {}
        self._gaps = gaps
        self._waiting: deque[Delivery] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, delivery: Delivery) -> bool:
        """Whether there was room for it."""
        if self._closed:
            return True
        if len(self._waiting) >= self._limit:
            self.mark_gap()
            return False
        if self._each:
            count = self._of_subject.get(delivery.subject, 0)
            if count >= self._each:
                return False
            self._of_subject[delivery.subject] = count + 1
        self._waiting.append(delivery)
        self._wake.set()
        return True

    def mark_gap(self) -> None:
        """Tell the reader, where it asked for that, that something may be missing here."""
        if self._gaps and not (self._waiting and self._waiting[-1] is GAP):
            self._waiting.append(GAP)
            self._wake.set()

    def close(self) -> None:
        """What waits is still read; after it the iteration ends."""
        self._closed = True
        self._wake.set()

    def waiting(self) -> list[Delivery]:
        """All that waits, taken out at once."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._of_subject.clear()
        return taken

    def __aiter__(self) -> "Mailbox":
        return self

    async def __anext__(self) -> Delivery:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        taken = self._waiting.popleft()
        if self._each and taken is not GAP:
            self._of_subject[taken.subject] -= 1
            if not self._of_subject[taken.subject]:
                del self._of_subject[taken.subject]
        return taken
