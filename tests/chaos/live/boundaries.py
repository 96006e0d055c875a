"""Write boundaries of a real process: passed one by one, until the one at which it is to end.

The ports are wrapped where `__main__` assembles them: the bus by a subclass, the spool by its Disk.
"""

import asyncio
import itertools
import os
import random
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edge_client.disk import Disk
from shared import subjects
from shared.bus import Appended, Batch
from shared.nats_bus import NatsBus

KILL_AT, KILL_TOLD = "CHAOS_KILL_AT", "CHAOS_KILL_TOLD"

_APPENDS = [
    f"{how} {where}"
    for how in ("append", "appending", "appended")
    for where in ("LOG", "DETAIL", "BLOBS")
]
_PUBLISHES = {
    "aggregator": ("settled", "service", "reply"),
    "scheduler": ("reply", "decision", "wake", "service"),
    "edge": ("update", "report"),
}
_OTHERS = {
    "aggregator": [*_APPENDS, "taken", "acknowledge", "acknowledged"],
    "scheduler": [],
    "edge": [
        *("request", "answered", "write", "writing", "written", "fsync", "fsynced"),
        *("rename", "renamed", "remove", "removed"),
        *("append line", "appending line", "appended line"),
    ],
}
NAMES = {
    program: [
        *_OTHERS[program],
        *(f"{how} {what}" for what in _PUBLISHES[program] for how in ("publish", "published")),
    ]
    for program in _OTHERS
}
"""Every boundary that a program passes while it serves a job."""

ACKNOWLEDGEMENTS = (b"+ACK", b"-NAK")
IN_FLIGHT_S = 0.003
"""Within this an append that is under way is caught by its process's end."""


class Switch:
    """Ends the process with SIGKILL at a boundary, after telling the file `told` which it was.

    `at` is `12`, the twelfth boundary of all, or `acknowledge:2`, the second of that name; empty:
    never.
    """

    def __init__(self, at: str, told: Path) -> None:
        self._name, _, number = at.rpartition(":")
        self._number = int(number or 0)
        self._told = told
        self._passed = itertools.count(1)  # its next() is atomic: the spool's thread counts too

    def due(self, what: str) -> bool:
        """Whether the boundary that is passed now is the one."""
        return self._name in ("", what) and next(self._passed) == self._number

    def kill(self, what: str) -> None:
        """The process is gone. What it wrote to a file stays; what its sockets hold may be sent."""
        with self._told.open("a", encoding="utf-8") as file:
            file.write(what + "\n")
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    def passed(self, what: str) -> None:
        if self.due(what):
            self.kill(what)

    @classmethod
    def of_environment(cls) -> "Switch":
        return cls(os.environ.get(KILL_AT, ""), Path(os.environ.get(KILL_TOLD, os.devnull)))


class KilledBus(NatsBus):
    """A bus whose every write is a boundary: before it, in the middle of it, after it."""

    switch = Switch.of_environment()

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        ours = subject.startswith(subjects.PREFIX + ".")
        what = subject.split(".")[2] if ours else "reply"
        self.switch.passed(f"publish {what}")
        await super().publish(subject, data, headers)
        if self.switch.due(f"published {what}"):
            if len(data) % 2:  # of some the bytes have left the process, of some not
                with suppress(Exception):
                    await self.flush()
            self.switch.kill(f"published {what}")

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        self.switch.passed("request")
        answer = await super().request(subject, data, timeout_s=timeout_s)
        self.switch.passed("answered")
        return answer

    async def append(
        self,
        subject: str,
        data: bytes,
        *,
        stream: str,
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Appended:
        self.switch.passed(f"append {stream}")
        appending = asyncio.ensure_future(
            super().append(
                subject, data, stream=stream, expected_last=expected_last, headers=headers
            )
        )
        if self.switch.due(f"appending {stream}"):
            await asyncio.wait({appending}, timeout=random.uniform(0, IN_FLIGHT_S))
            self.switch.kill(f"appending {stream}")
        try:
            appended = await appending
        except asyncio.CancelledError:
            appending.cancel()
            raise
        self.switch.passed(f"appended {stream}")
        return appended

    async def take(self, stream: str, consumer: str, *, limit: int, wait_s: float) -> Batch | None:
        batch = await super().take(stream, consumer, limit=limit, wait_s=wait_s)
        if batch is not None:
            self.switch.passed("taken")
        return batch

    async def send(self, subject: str, data: bytes, *, reply: str = "") -> None:
        acknowledges = data.startswith(ACKNOWLEDGEMENTS)
        if acknowledges:
            self.switch.passed("acknowledge")
        await super().send(subject, data, reply=reply)
        if acknowledges:
            self.switch.passed("acknowledged")

    async def purge(self, stream: str, subject: str) -> int:
        self.switch.passed(f"purge {stream}")
        return await super().purge(stream, subject)


class KilledDisk(Disk):
    """A disk whose every step is a boundary; a kill inside a write leaves half of it.

    Each update that is on disk for good stays linked in `kept`, for a witness to read.
    """

    def __init__(self, directory: Path, kept: Path, switch: Switch) -> None:
        super().__init__(directory)
        self._kept = kept
        self._switch = switch

    def write(self, name: str, data: bytes) -> None:
        self._switch.passed("write")
        if self._switch.due("writing"):
            super().write(name, data[: len(data) // 2])
            self._switch.kill("writing")
        super().write(name, data)
        self._switch.passed("written")

    def append(self, name: str, data: bytes) -> None:
        self._switch.passed("append line")
        if self._switch.due("appending line"):
            super().append(name, data[: len(data) // 2])
            self._switch.kill("appending line")
        super().append(name, data)
        self._switch.passed("appended line")

    def truncate(self, name: str, size_bytes: int) -> None:
        self._switch.passed("truncate")
        super().truncate(name, size_bytes)
        self._switch.passed("truncated")

    def sync(self, name: str = "") -> None:
        self._switch.passed("fsync")
        super().sync(name)
        if not name:
            self._keep()
        self._switch.passed("fsynced")

    def rename(self, name: str, to: str) -> None:
        self._switch.passed("rename")
        super().rename(name, to)
        self._switch.passed("renamed")

    def remove(self, name: str) -> None:
        self._switch.passed("remove")
        super().remove(name)
        self._switch.passed("removed")

    def _keep(self) -> None:
        self._kept.mkdir(parents=True, exist_ok=True)
        for name in self.names():
            if name.endswith((".update", ".bad")):
                with suppress(FileExistsError):
                    os.link(self.directory / name, self._kept / name)
