"""Connections that failed before they could say who they are: only the broker's log knows them."""

import asyncio
import re

from shared import nats_bus, subjects
from shared.codec import encode
from shared.identity.access import Access
from shared.messages import ConnectionRefused

MAX_WAITING = 64
_PROBE = "connection reset by peer"
"""It went without reading the broker's greeting: it tried whether the port is open."""
_MEANS = {"EOF": "it does not trust the certificate, or only tried the port"}
_FAILED = re.compile(r"\] (?P<host>\S+):\d+ - cid:\d+ - TLS handshake error: (?P<why>.*)")


class Handshakes:
    """Hears the broker's complaints, and tells the registrar of those that it cannot see."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[ConnectionRefused] = asyncio.Queue(MAX_WAITING)

    @property
    def waiting(self) -> int:
        """How many have not been told of yet."""
        return self._waiting.qsize()

    def hear(self, line: str) -> None:
        """Take one line of the broker's log; a flood is told of in part."""
        found = _FAILED.search(line.rstrip())
        if found is None or found["why"].endswith(_PROBE):
            return
        if not self._waiting.full():
            reason = f"gone before it said who it is: {_MEANS.get(found['why'], found['why'])}"
            self._waiting.put_nowait(ConnectionRefused(reason=reason, host=found["host"]))

    async def tell(self, fleet: Access) -> None:
        """Tell of each, until cancelled."""
        bus = await nats_bus.connect(fleet.servers, name="up", credentials=fleet.credentials())
        try:
            while True:
                message = await self._waiting.get()
                await bus.publish(subjects.IDENTITY_REFUSED, encode(message))
        finally:
            await bus.close()
