"""What the daemon tells its supervisor: systemd by datagrams, a container's health check by a file.

Both beat from the event loop itself, so a daemon that hangs is not taken for a live one. To be
without a broker is no failure: a device may start offline and stay so for a day. Its status tells.

Source: sd_notify(3), systemd.service(5): READY, STATUS, WATCHDOG, STOPPING.
"""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from shared import heartbeat
from shared.errors import ConfigError
from shared.logs import get
from shared.runtime import Stop

READY_AFTER_S = 0.5
"""A setting that cannot be used ends the daemon before this, and so fails its start."""
BEAT_S = 10.0
MISSED_BEATS = 3

Standing = tuple[bool, str]
"""Whether the broker is there, and what the daemon does, in a line."""

log = get("notify")


class Supervisor:
    """Whoever watches this process; nobody, if neither a socket nor a file is named."""

    def __init__(self, environ: Mapping[str, str], health_file: str = "") -> None:
        self.standing: Callable[[], Standing] = lambda: (False, "waiting for the broker")
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._file = Path(health_file) if health_file else None
        self.watched = bool(self._address or self._file)
        self.beat_s = min(BEAT_S, _watchdog_s(environ) / MISSED_BEATS)

    def ready(self) -> None:
        """It runs, and whatever is not there yet is tried again and again."""
        self._beat("READY=1")

    def beat(self) -> None:
        """It still turns."""
        self._beat()

    def stopping(self) -> None:
        """It drains; what it took is finished or spooled."""
        self._tell("STOPPING=1", "STATUS=draining")

    def _beat(self, *more: str) -> None:
        connected, status = self.standing()
        self._tell(*more, "WATCHDOG=1", f"STATUS={status}")
        try:
            self._write(connected, status)
        except OSError as error:  # what is there grows old, and that is the truth
            log.warning("heartbeat_not_written", why=str(error))

    def check_file(self) -> None:
        """The file can be written, and holds a first heartbeat.

        Raises:
            ConfigError: it cannot.
        """
        try:
            self._write(*self.standing())
        except OSError as error:
            raise ConfigError(
                f"health_file {self._file}: {error.strerror}; name one that can be written"
            ) from error

    def _write(self, connected: bool, status: str) -> None:
        if self._file is not None:
            within_s = MISSED_BEATS * self.beat_s
            heartbeat.write(self._file, connected=connected, status=status, within_s=within_s)

    def _tell(self, *lines: str) -> None:
        """One datagram; a supervisor that does not listen costs nothing but this attempt."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            try:
                sender.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                log.debug("supervisor_not_told", why=str(error))


@asynccontextmanager
async def supervised(
    stop: Stop, health_file: str = "", environ: Mapping[str, str] | None = None
) -> AsyncGenerator[Supervisor, None]:
    """While this is open the supervisor hears that the daemon lives; at the stop, that it drains.

    Raises:
        ConfigError: `health_file` cannot be written.
    """
    supervisor = Supervisor(os.environ if environ is None else environ, health_file)
    if not supervisor.watched:
        yield supervisor
        return
    supervisor.check_file()
    async with asyncio.TaskGroup() as tasks:
        beating = tasks.create_task(_beating(supervisor, stop))
        try:
            yield supervisor
        finally:
            beating.cancel()


async def _beating(supervisor: Supervisor, stop: Stop) -> None:
    if not await stop.sleep(READY_AFTER_S):
        supervisor.ready()
        while not await stop.sleep(supervisor.beat_s):
            supervisor.beat()
    supervisor.stopping()
    while True:
        await asyncio.sleep(supervisor.beat_s)
        supervisor.beat()  # a drain takes its time, and is watched over as well


def _address(named: str) -> str:
    """A path, or a name in the abstract namespace, which systemd writes with an `@`."""
    return f"\0{named[1:]}" if named.startswith("@") else named


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """How long systemd waits for a sign of life; for ever, if it does not wait for ours."""
    try:
        process = int(environ.get("WATCHDOG_PID") or os.getpid())
        microseconds = int(environ.get("WATCHDOG_USEC") or 0)
    except ValueError:
        return float("inf")
    return microseconds / 1e6 if microseconds > 0 and process == os.getpid() else float("inf")
