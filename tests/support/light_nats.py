"""NATS by hand, as little of it as thousands of devices in one process need."""

import asyncio
from collections.abc import Callable

Heard = Callable[[str, str, bytes], None]
"""(subject, reply, data)"""


class LightClient(asyncio.Protocol):
    """One connection. `heard` gets each message; `lost` is called when the connection is gone."""

    def __init__(self, heard: Heard, lost: Callable[[], None] = lambda: None) -> None:
        self._heard = heard
        self._lost = lost
        self._rest = b""
        self._transport: asyncio.Transport
        self._room = asyncio.Event()
        self._room.set()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._subscriptions = 0

    @classmethod
    async def connect(
        cls, host: str, port: int, heard: Heard, lost: Callable[[], None] = lambda: None
    ) -> "LightClient":
        """Connected, and greeted by the server.

        Raises:
            OSError: nobody is there, or it went away meanwhile.
        """
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(heard, lost), host, port)
        await client._ready
        return client

    def subscribe(self, subject: str) -> None:
        self._subscriptions += 1
        self._transport.write(f"SUB {subject} {self._subscriptions}\r\n".encode())

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        where = f"{subject} {reply}" if reply else subject
        self._transport.write(b"PUB %s %d\r\n%s\r\n" % (where.encode(), len(data), data))

    async def drain(self) -> None:
        """The socket takes more."""
        await self._room.wait()

    def abort(self) -> None:
        self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.set()
        if not self._ready.done():
            self._ready.set_exception(ConnectionResetError("closed before it was greeted"))
            self._ready.exception()
        self._lost()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            line = data[at:end]
            following = end + 2
            if line.startswith((b"MSG ", b"HMSG ")):
                parts = line.decode().split(" ")
                size = int(parts[-1])
                if len(data) < following + size + 2:
                    break
                body = data[following : following + size]
                if line.startswith(b"HMSG "):
                    body = body[int(parts[-2]) :]
                    del parts[-2]
                self._heard(parts[1], parts[3] if len(parts) == 5 else "", body)
                following += size + 2
            elif line == b"PING":
                self._transport.write(b"PONG\r\n")
            elif line.startswith(b"INFO ") and not self._ready.done():
                self._transport.write(
                    b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n'
                )
                self._ready.set_result(None)
            at = following
        self._rest = data[at:]
