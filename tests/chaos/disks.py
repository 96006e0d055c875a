"""A device's disk in memory: every step may be the last, and what was not synced may be lost.

A kill leaves what was written, the last write perhaps torn. A power cut leaves of every file what
was synced and any part of what was not, and of renames and removals any first few, in their order.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from edge_client.disk import Disk

Names = dict[str, "Inode"]


class Inode:
    """What a file holds, and how much of that a power cut leaves."""

    def __init__(self) -> None:
        self.data = b""
        self.synced = b""


class Platters:
    """What outlives a process: the names as everyone sees them, and as a power cut leaves them."""

    def __init__(self, chance: random.Random) -> None:
        self.names: Names = {}
        self.full = False
        self.replaced: list[bytes] = []
        """What the ledger held each time before it was trimmed."""
        self.durable: Callable[[str, bytes], None] = lambda name, data: None
        """Is told of each update that will outlive a power cut."""
        self._chance = chance
        self._synced: Names = {}
        self._since: list[Names] = []
        """The names after each step since the last sync of them."""

    @property
    def size_bytes(self) -> int:
        """What updates take."""
        return sum(len(n.data) for name, n in self.names.items() if name.endswith(".update"))

    @property
    def busy(self) -> bool:
        """Whether an update is not settled, or not yet in the ledger as settled."""
        return any(name.endswith((".update", ".settled")) for name in self.names)

    def renamed(self) -> None:
        self._since.append(dict(self.names))

    def sync_names(self) -> None:
        for name, inode in self.names.items():
            if name not in self._synced:
                self.durable(name, inode.data)
        self._synced, self._since = dict(self.names), []

    def power_cut(self) -> None:
        """What is left when the power comes back."""
        states = [self._synced, *self._since]
        self.names = dict(self._chance.choice(states))
        for inode in self.names.values():
            if inode.data.startswith(inode.synced):
                more = self._chance.randint(0, len(inode.data) - len(inode.synced))
                inode.data = inode.data[: len(inode.synced) + more]
            else:
                inode.data = self._chance.choice([inode.synced, inode.data])
            inode.synced = inode.data
        self.sync_names()


class SimulatedDisk(Disk):
    """One process's way to the platters. `step` may end the process, at any boundary."""

    def __init__(self, platters: Platters, step: Callable[[str], None]) -> None:
        super().__init__(Path("spool"))
        self._platters = platters
        self._step = step

    def prepare(self) -> None:
        """The directory is always there."""

    def names(self) -> list[str]:
        return sorted(self._platters.names)

    def read(self, name: str) -> bytes:
        return self._inode(name).data

    def lines(self, name: str) -> Iterator[bytes]:
        yield from self._inode(name).data.splitlines(keepends=True)

    def write(self, name: str, data: bytes) -> None:
        self._room(data)
        self._step("disk write")
        inode = self._platters.names[name] = Inode()
        self._platters.renamed()
        inode.data = data[: len(data) // 2]
        self._step("half of disk write")
        inode.data = data

    def append(self, name: str, data: bytes) -> None:
        self._room(data)
        if name not in self._platters.names:
            self._platters.names[name] = Inode()
            self._platters.renamed()
        if not data:
            return
        inode = self._inode(name)
        before = inode.data
        self._step("disk append")
        inode.data = before + data[: len(data) // 2]
        self._step("half of disk append")
        inode.data = before + data

    def truncate(self, name: str, size_bytes: int) -> None:
        self._step("disk truncate")
        inode = self._inode(name)
        inode.data = inode.data[:size_bytes]
        inode.synced = inode.synced[:size_bytes]

    def sync(self, name: str = "") -> None:
        self._step("disk sync")
        if name:
            inode = self._inode(name)
            inode.synced = inode.data
        else:
            self._platters.sync_names()
        self._step("disk synced")

    def rename(self, name: str, to: str) -> None:
        self._step("disk rename")
        if to == "ledger.jsonl":
            self._platters.replaced.append(self._inode(to).data)
        self._platters.names[to] = self._inode(name)
        del self._platters.names[name]
        self._platters.renamed()
        self._step("disk renamed")

    def remove(self, name: str) -> None:
        self._step("disk remove")
        if self._platters.names.pop(name, None) is not None:
            self._platters.renamed()
        self._step("disk removed")

    def _inode(self, name: str) -> Inode:
        if name not in self._platters.names:
            _refuse(errno.ENOENT, name)
        return self._platters.names[name]

    def _room(self, data: bytes) -> None:
        if self._platters.full and data:
            _refuse(errno.ENOSPC, "")


def _refuse(number: int, name: str) -> NoReturn:
    raise OSError(number, os.strerror(number), name)
