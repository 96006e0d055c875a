"""One `seedwire up` to a state directory, and nothing that an earlier one left there."""

import asyncio
import fcntl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from shared.errors import ConfigError

LEFT_BEHIND_S = 30.0
"""The children of an `up` that was killed drain in vain, without their broker, for up to 20 s."""
LOOK_S = 0.1


@asynccontextmanager
async def locked(state_dir: Path, say: Callable[[str], None]) -> AsyncGenerator[int]:
    """This process and its children have the state directory, which exists, to themselves.

    Yields a descriptor that every child must inherit: its lock is free when the last one has ended.

    Raises:
        ConfigError: another `up` uses the directory, or it cannot be written.
    """
    with _opened(state_dir, "lock") as own, _opened(state_dir, "children.lock") as inherited:
        if not _taken(own):
            raise ConfigError(
                f"state directory {state_dir} is in use by another `seedwire up`: stop it, or "
                "choose another --state-dir"
            )
        if not _taken(inherited):
            say("waiting for what an earlier `seedwire up` left running")
        if not await _released(inherited):
            raise ConfigError(
                f"state directory {state_dir} is in use by what an earlier `seedwire up` left "
                "running: end its nats-server, services and devices"
            )
        yield inherited.fileno()


def _opened(state_dir: Path, name: str) -> IO[str]:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        return (state_dir / name).open("w")
    except OSError as error:
        raise ConfigError(f"--state-dir {state_dir}: {error.strerror}") from error


async def _released(file: IO[str]) -> bool:
    """Whether the lock is ours, now or as soon as those who have it end."""
    for _ in range(int(LEFT_BEHIND_S / LOOK_S)):
        if _taken(file):
            return True
        await asyncio.sleep(LOOK_S)
    return False


def _taken(file: IO[str]) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
