"""`seedwire-edge`: the daemon of one device."""

import asyncio
import fcntl
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from edge_client.config import PREFIX, Settings, completed
from edge_client.identity import completed_by_identity, credentials, enrolled
from edge_client.notify import Supervisor, supervised
from edge_client.service import Edge
from edge_client.spool import Spool
from shared import config, logs
from shared.engine.process import EngineProcess
from shared.errors import ConfigError
from shared.nats_bus import NatsBus, connect
from shared.runtime import EXIT_CONFIG, Stop, run

PING_INTERVAL_S = 120


def main() -> int:
    """Run the daemon, or `enroll`; the exit code."""
    if sys.argv[1:2] == ["enroll"]:
        from edge_client import enrolling  # the daemon goes without it

        return enrolling.main(sys.argv[2:])
    for sentence in config.misspelt(Settings, PREFIX):
        print(f"warning: {sentence}", file=sys.stderr)  # noqa: T201 - as the error below
    try:
        settings = completed(
            config.load(Settings, program="seedwire-edge", prefix=PREFIX, argv=sys.argv[1:])
        )
        logs.configure("edge", level=settings.log_level)
        with _alone(Path(settings.state_dir)):
            return run(lambda stop: _watched(settings, stop))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - for whoever has no log reader
        return EXIT_CONFIG


async def _watched(settings: Settings, stop: Stop) -> None:
    async with supervised(stop, settings.health_file) as supervisor:
        await _serve(settings, stop, supervisor)


async def _serve(settings: Settings, stop: Stop, supervisor: Supervisor) -> None:
    log = logs.get("edge").bind(device=settings.device)
    log.info("starting", settings=config.shown(settings, changed_only=True))
    directory = Path(settings.state_dir) / "spool"
    spool = await asyncio.to_thread(
        Spool,
        directory,
        max_bytes=settings.max_spool_bytes,
        max_ledger_bytes=settings.max_ledger_bytes,
    )
    connecting = asyncio.ensure_future(_connected(settings))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not connecting.done():
        connecting.cancel()
        await asyncio.wait({connecting})
        return
    bus = await connecting
    process = EngineProcess(settings.engine)
    try:
        edge = Edge(settings, bus, bus, spool, process)
        supervisor.standing = edge.standing
        await edge.run(stop)
    finally:
        await process.close()
        await bus.close()
    log.info("stopped", engine_peak_mb=round(process.peak_rss_mb), spooled=len(spool))


async def _connected(settings: Settings) -> NatsBus:
    """A bus to the broker, as whom the device's identity says.

    Raises:
        ConfigError: the identity or the ticket cannot be used.
    """
    if settings.ticket and not enrolled(Path(settings.state_dir)):
        from edge_client import enrolling

        await enrolling.enroll_patiently(settings)
    settings = completed_by_identity(settings)
    return await connect(
        list(settings.servers),
        name=f"edge {settings.device}",
        credentials=credentials(settings),
        ping_interval_s=PING_INTERVAL_S,
    )


@contextmanager
def _alone(state_dir: Path) -> Generator[None, None, None]:
    """No other daemon uses the state directory.

    Raises:
        ConfigError: one does, or the directory cannot be written.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"state_dir {state_dir}: {error.strerror}; set another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"state_dir {state_dir} is in use by another daemon") from error
        yield


if __name__ == "__main__":
    sys.exit(main())
