"""A process's link to the broker: it drops, delays, throttles, cuts half-way, refuses."""

import asyncio
import contextlib
from typing import Literal

Trouble = Literal["cut", "half_cut", "refuse", "swallow", "delay", "throttle"]
TROUBLES: tuple[Trouble, ...] = ("cut", "half_cut", "refuse", "swallow", "delay", "throttle")

DELAY_S = 0.15
THROTTLED_BYTES_PER_S = 8_000
CHUNK = 65536


class Wire:
    """`host`:`port`, on to the broker, through whatever trouble there is at the time."""

    def __init__(self, broker_port: int, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = 0
        self._broker_port = broker_port
        self._until: dict[Trouble, float] = {}
        self._deaf: set[asyncio.StreamWriter] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    async def stop(self) -> None:
        """Nobody is connected, or can be."""
        if self._server is not None:
            self._server.close()
        self._abort()
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def suffer(self, trouble: Trouble, for_s: float) -> None:
        """The trouble has come, and is over. A swallowed connection breaks only at its end."""
        self._until[trouble] = asyncio.get_running_loop().time() + for_s
        if trouble in ("cut", "refuse"):
            self._abort()
        elif trouble == "swallow":
            self._deaf |= self._writers
        await asyncio.sleep(for_s)
        if trouble == "swallow":
            self._abort()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _suffers(self, trouble: Trouble) -> bool:
        return asyncio.get_running_loop().time() < self._until.get(trouble, 0.0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._suffers("refuse"):
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._broker_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        if self._suffers("swallow"):
            self._deaf |= {writer, up_writer}
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            pump = asyncio.ensure_future(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(CHUNK):
                    if self._suffers("half_cut"):
                        self._until.pop("half_cut")
                        sink.write(data[: len(data) // 2])
                        await sink.drain()
                        await asyncio.sleep(0)
                        break
                    await self._carry(data, sink)
        finally:
            self._writers.discard(sink)
            self._deaf.discard(sink)
            sink.close()

    async def _carry(self, data: bytes, sink: asyncio.StreamWriter) -> None:
        if sink in self._deaf:
            return
        if self._suffers("delay"):
            await asyncio.sleep(DELAY_S)
        if self._suffers("throttle"):
            await asyncio.sleep(min(0.5, len(data) / THROTTLED_BYTES_PER_S))
        sink.write(data)
        await sink.drain()
