"""A device's link to the broker, as a TCP proxy that counts bytes; a bad one delays and fails.

TCP hides lost packets, so a lossy link is what an application sees of one: bursts of delay, a
connection cut in the middle of a message, and refused connections for a while.
"""

import asyncio
import contextlib
import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Weather:
    """How bad a link is. Times in seconds; each is a mean, drawn anew every time."""

    delay_s: float = 0.0
    cut_every_s: float = 0.0
    outage_s: float = 0.0


CLEAR = Weather()
BAD = Weather(delay_s=0.03, cut_every_s=6.0, outage_s=1.5)


@dataclass
class Link:
    """Forwards 127.0.0.1:`port` to the broker."""

    broker_port: int
    weather: Weather
    chance: random.Random
    port: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    cuts: int = 0
    _down_until: float = 0.0
    _server: asyncio.Server | None = None
    _open: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    def cut(self, for_s: float) -> None:
        """The link is down from now on for so long: what was open breaks, what comes is refused."""
        self._down_until = asyncio.get_running_loop().time() + for_s
        self.cuts += 1
        for task in list(self._open):
            task.cancel()

    def mend(self) -> None:
        """The link takes connections again."""
        self._down_until = 0.0

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if asyncio.get_running_loop().time() < self._down_until:
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._carry(reader, writer)
        finally:
            self._open.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.broker_port)
        tasks = [
            asyncio.ensure_future(self._pump(reader, up_writer, up=True)),
            asyncio.ensure_future(self._pump(up_reader, writer, up=False)),
        ]
        if self.weather.cut_every_s:
            tasks.append(asyncio.ensure_future(self._cut()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for end in (writer, up_writer):
                end.transport.abort()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _cut(self) -> None:
        """Return when it is time to cut the connection; then it stays down for a while."""
        await asyncio.sleep(self.chance.expovariate(1 / self.weather.cut_every_s))
        self.cuts += 1
        outage = self.chance.expovariate(1 / self.weather.outage_s)
        self._down_until = asyncio.get_running_loop().time() + outage

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        while data := await reader.read(65536):
            if self.weather.delay_s:
                await asyncio.sleep(self.chance.expovariate(1 / self.weather.delay_s))
            if up:
                self.bytes_up += len(data)
            else:
                self.bytes_down += len(data)
            writer.write(data)
            await writer.drain()
