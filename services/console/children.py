"""Child processes that should stay up: started, restarted with backoff, drained."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shared.clock import backoff_s
from shared.errors import ConfigError
from shared.orphans import ends_with_parent
from shared.runtime import EXIT_CONFIG, Stop

DRAIN_S = 25.0
STEADY_S = 60.0
"""Whoever lived so long starts its backoff anew."""
MAX_LOG_BYTES = 16 * 1024 * 1024
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Program:
    """A Python module and its arguments; `name` names its log file."""

    name: str
    module: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    """What it is told beside: secrets, which arguments would show to everybody."""


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Keeps programs up until `stop`."""

    logs: Path
    stop: Stop
    say: Callable[[str], None]
    inherits: tuple[int, ...] = ()
    """File descriptors that the programs hold open while they run."""

    async def keep(self, program: Program) -> None:
        """Run `program` until the stop, again whenever it ends before.

        Raises:
            ConfigError: it says that its configuration is wrong; with its own words.
        """
        attempt = 0
        loop = asyncio.get_running_loop()
        while not self.stop.asked:
            began = loop.time()
            code = await self._run(program)
            if self.stop.asked:
                return
            if code == EXIT_CONFIG:
                raise ConfigError(f"{program.name}: {last_words(self.log_of(program))}")
            attempt = 0 if loop.time() - began >= STEADY_S else attempt + 1
            delay_s = backoff_s(attempt)
            self.say(
                f"{program.name} ended with code {code}, starts again in {delay_s:.1f} s "
                f"(log: {self.log_of(program)})"
            )
            if await self.stop.sleep(delay_s):
                return

    def log_of(self, program: Program) -> Path:
        return self.logs / f"{program.name}.log"

    async def _run(self, program: Program) -> int:
        path = self.log_of(program)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        python_path = os.pathsep.join(
            part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part
        )
        with path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", program.module, *program.arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": python_path, **program.environment},
                pass_fds=self.inherits,
                start_new_session=True,  # Ctrl-C comes to us alone: we say when to drain
                preexec_fn=ends_with_parent(),
            )
        ended = asyncio.ensure_future(process.wait())
        stopped = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            code = await _end(process)
            await ended
        return code


async def _end(process: asyncio.subprocess.Process) -> int:
    """The exit code of `process`, which is asked to drain, and killed if it does not."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(DRAIN_S):
                return await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return await process.wait()


def last_words(log: Path) -> str:
    """The last `error: ...` line of a log, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or ["it left no words"])[-1]
