"""llama-cpp-python's own server as a process of its own, as the one that a large model lives on."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from services.console.addresses import free_port


class LlamaCppServer:
    """One address; the process behind it may be killed and started again."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.url = ""
        self._model = model
        self._log = log
        self._options = options
        self._port = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """It answers."""
        self._port = self._port or free_port()
        self.url = f"http://127.0.0.1:{self._port}/v1"
        command = [sys.executable, "-m", "llama_cpp.server", "--model", str(self._model)]
        command += ["--port", str(self._port), "--n_threads", "1", "--n_threads_batch", "1"]
        command += ["--n_ctx", "512", "--verbose", "false", *self._options]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            while not await self._answers(http):
                assert self._process.returncode is None, self._log.read_text()[-2000:]
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """It is gone at once, in the middle of whatever it answers."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _answers(self, http: aiohttp.ClientSession) -> bool:
        try:
            async with http.get(f"{self.url}/models") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def a_large_server(
    model: Path, log: Path, *options: str
) -> AsyncGenerator[LlamaCppServer, None]:
    """A server of `model` with `options` of llama_cpp.server's; gone at the end."""
    server = LlamaCppServer(model, log, *options)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()
