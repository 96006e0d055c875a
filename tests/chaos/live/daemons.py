"""A process under a supervisor: started again whenever it dies, until it is told to end."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from deploy.demo.processes import Child
from shared.runtime import EXIT_CONFIG
from tests.chaos.live.boundaries import KILL_AT, KILL_TOLD
from tests.chaos.live.entry import KEPT, MUTATION, NAMESPACE

DRAIN_S = 25.0


class Daemon:
    """One program through all its lives. `wrong` is told of an end that nobody brought about."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        folder: Path,
        *,
        kills: tuple[str, ...] = (),
        mutation: str = "",
        namespace: str = "",
        wrong: Callable[[str], None],
        died: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`arguments` begin with the program; `died` is awaited before each new life."""
        self.name = name
        self.lives = 0
        self.fenced = False
        self.outages: list[tuple[int, int]] = []
        """From when to when, by the machine's clock in ns, it was not there."""
        self.kept = folder / "kept" / name
        self.told = folder / f"{name}.boundaries"
        self._kills = kills
        self._wrong = wrong
        self._died = died
        self._down_s = 0.0
        self._asked = False
        self._ending = False
        self._armed = False
        environment = {
            KILL_TOLD: str(self.told),
            KEPT: str(self.kept),
            MUTATION: mutation,
            NAMESPACE: namespace,
        }
        self._child = Child(
            name, "tests.chaos.live.entry", arguments, folder / f"{name}.log", environment
        )

    async def live(self) -> None:
        """Its lives, one after the other."""
        began = 0
        while not self._ending:
            at = self._kills[self.lives] if self.lives < len(self._kills) else ""
            self._child.environment[KILL_AT] = at
            self._armed = bool(at)
            self.lives += 1
            await self._child.start()
            if began:
                self.outages.append((began, time.time_ns()))
            assert self._child.process is not None
            code = await self._child.process.wait()
            began = time.time_ns()
            if not self._goes_on(code):
                return
            if self._died is not None:
                await self._died()
            await asyncio.sleep(self._down_s)
            self._down_s = 0.0

    def _goes_on(self, code: int) -> bool:
        asked, self._asked = self._asked, False
        if self._ending:
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM):
                self._wrong(f"{self.name} ended with exit code {code} when it was to drain")
            return False
        if code == EXIT_CONFIG and self.name in ("aggregator", "rival"):
            self.fenced = True
            return False
        if code == -signal.SIGKILL or (asked and code in (0, -signal.SIGTERM)):
            return True
        self._wrong(f"{self.name} ended by itself with exit code {code}; see its log")
        return True

    def spare(self) -> None:
        """No life ends at a boundary from now on; one that still would ends here."""
        self._kills = ()
        if self._armed:
            self._child.signal(signal.SIGKILL)

    async def kill(self, down_s: float) -> None:
        self._down_s = down_s
        self._child.signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM; it drains, or ends at once if it has just begun."""
        if self._child.running:
            self._asked = True
            self._child.signal(signal.SIGTERM)

    async def freeze(self, for_s: float) -> None:
        """It stands still, as a machine that swaps or sleeps."""
        began = time.time_ns()
        self._child.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(for_s)
        finally:
            self._child.signal(signal.SIGCONT)
        self.outages.append((began, time.time_ns()))

    async def end(self) -> None:
        """It has drained; killed, and told, where that takes too long."""
        self._ending = True
        process = self._child.process
        if process is None or not self._child.running:
            return
        self._child.signal(signal.SIGCONT)
        if await self._child.stop(timeout_s=DRAIN_S) == -1:
            self._wrong(f"{self.name} did not drain within {DRAIN_S:g} s")

    @property
    def boundaries(self) -> list[str]:
        """At which boundaries its lives ended."""
        return self.told.read_text(encoding="utf-8").split("\n")[:-1] if self.told.exists() else []


def log_tail(folder: Path, characters: int = 2000) -> str:
    """The end of every process's log, for a report of a violation."""
    return os.linesep.join(
        f"== {path.name}\n{path.read_text(encoding='utf-8', errors='replace')[-characters:]}"
        for path in sorted(folder.glob("*.log"))
    )
