"""The live page's stream: server-sent events, first everything, then what changed.

A page costs a number and one message in the making: what it has not taken yet is not kept for it,
it is made from the state when its connection has room again. One that takes nothing is dropped.
"""

import asyncio
import contextlib
from dataclasses import dataclass

import msgspec
from aiohttp import web

from services.telemetry import view
from services.telemetry.service import Observer
from shared.clock import Clock
from shared.logs import get

log = get("telemetry")

MAX_PAGES = 32
TICK_S = 1.0
"""How often a page is told what changed."""
PAGE_BYTES_PER_S = 100_000
"""A page that is told more than this is told less often."""
LONGEST_TICK_S = 10.0
SILENCE_S = 15.0
"""A page that nothing was said to for so long is told that we are here."""
STALLED_S = 20.0
"""A page that takes nothing for so long is dropped."""
RETRY_MS = 2_000


@dataclass
class Reader:
    """What one page has been told."""

    asked: str
    """The job it wants; empty: the current one."""
    chosen: str = ""
    version: int = -1
    """-1: nothing yet."""
    fleet: view.Fleet | None = None


class Live:
    """All open pages."""

    def __init__(self, observer: Observer, clock: Clock) -> None:
        self._observer = observer
        self._clock = clock
        self._closing = asyncio.Event()
        self.pages = 0

    def close(self) -> None:
        """Every stream ends soon."""
        self._closing.set()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Tell one page for as long as it listens.

        Raises:
            web.HTTPServiceUnavailable: too many pages are open.
        """
        if self.pages >= MAX_PAGES:
            reason = f"{MAX_PAGES} pages are open already; close one"
            raise web.HTTPServiceUnavailable(reason=reason)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        self.pages += 1
        try:
            await response.prepare(request)
            await self._tell(request, response, Reader(request.query.get("job", "")))
        except TimeoutError:
            log.info("page_dropped", why=f"it took nothing for {STALLED_S:g} s")
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the page was closed
        finally:
            self.pages -= 1
        return response

    async def _tell(
        self, request: web.Request, response: web.StreamResponse, reader: Reader
    ) -> None:
        await _write(response, f"retry: {RETRY_MS}\n\n".encode())
        silent_s = 0.0
        while not self._closing.is_set():
            message = self.message(reader)
            if message:
                await _write(response, message)
                silent_s = 0.0
            elif silent_s >= SILENCE_S:
                await _write(response, b": here\n\n")
                silent_s = 0.0
            pause_s = min(LONGEST_TICK_S, max(TICK_S, len(message) / PAGE_BYTES_PER_S))
            silent_s += pause_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._closing.wait()
            if request.transport is None or request.transport.is_closing():
                return

    def message(self, reader: Reader) -> bytes:
        """The next event for this page, which counts as told; empty if there is no news."""
        state, now = self._observer.state, self._clock.now()
        not_ready = self._observer.not_ready()
        chosen = reader.asked if reader.asked in state.jobs else state.current()
        shown = None
        if reader.version >= 0 and chosen == reader.chosen:
            shown = view.changed(state, chosen, reader.version, now)
        name = "changed"
        if shown is None:
            name, shown = "everything", view.everything(state, chosen, now, not_ready)
            reader.fleet = shown.fleet
        else:
            fleet = view.fleet(state, not_ready)
            if fleet == reader.fleet and shown.version == reader.version:
                return b""
            if fleet != reader.fleet:
                shown.fleet = reader.fleet = fleet
        reader.chosen, reader.version = chosen, shown.version
        return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(shown))


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(STALLED_S):
        await response.write(data)
