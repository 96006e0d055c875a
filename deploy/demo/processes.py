"""The demo's child processes: started with a log file each, measured, killed and ended."""

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Child:
    """One Python module as a process, and the highest memory it and its children were seen at."""

    name: str
    module: str
    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict[str, str])
    process: asyncio.subprocess.Process | None = None
    peak_rss_mb: float = 0.0
    children_peak_rss_mb: float = 0.0

    async def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.module,
                *self.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def kill(self) -> None:
        """End it as a power cut would: SIGKILL, no chance to tidy up."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()

    async def stop(self, *, timeout_s: float = 20.0) -> int:
        """Its exit code after SIGTERM; killed if it does not drain in time."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        try:
            async with asyncio.timeout(timeout_s):
                return await self.process.wait()
        except TimeoutError:
            await self.kill()
            return -1

    def measure(self) -> None:
        """Read the memory peaks that the kernel keeps (Linux); elsewhere they stay 0."""
        if self.process is None or not self.running:
            return
        self.peak_rss_mb = max(self.peak_rss_mb, _peak_mb(self.process.pid))
        for pid in _children(self.process.pid):
            self.children_peak_rss_mb = max(self.children_peak_rss_mb, _peak_mb(pid))


def _peak_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii")
            found += [int(word) for word in text.split()]
    return found
