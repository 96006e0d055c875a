"""A bad link: a TCP proxy that can swallow what passes, or cut every connection."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar


class Proxy:
    """Passes bytes both ways between its clients and one local port."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self._target_port = target_port
        self._deaf: set[asyncio.StreamWriter] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def swallow(self) -> None:
        """From now on nothing gets through the connections there are, and nobody is told."""
        self._deaf |= self._writers

    def swallow_answers(self) -> None:
        """From now on nothing comes back over the connections there are."""
        self._deaf |= self._clients

    def swallow_requests(self) -> None:
        """From now on nothing goes out over the connections there are."""
        self._deaf |= self._writers - self._clients

    def cut(self) -> None:
        """Break every connection there is."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, up_writer}
        self._clients.add(writer)
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if sink not in self._deaf:
                    sink.write(data)
                    await sink.drain()
        except OSError:
            pass
        finally:
            self._writers.discard(sink)
            self._clients.discard(sink)
            sink.close()


Link = TypeVar("Link", bound=Proxy)


@asynccontextmanager
async def on_a_port(proxy: Link) -> AsyncGenerator[Link, None]:
    """`proxy` has a port of its own while this is open."""
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()


def start_proxy(target_port: int) -> AbstractAsyncContextManager[Proxy]:
    """A proxy on a port of its own."""
    return on_a_port(Proxy(target_port))
