"""A network namespace for one device: its packets, and not its connections, meet with trouble.

Needs root and a kernel that allows it; `tc netem` besides, for more than a cable that is pulled.
"""

import asyncio
import ctypes
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/var/run/netns")
NETEM = "delay 40ms 30ms loss 10% duplicate 5% reorder 20% 50%"


class Unavailable(Exception):
    """This machine cannot do it; the text says what."""


@dataclass
class Namespace:
    """A namespace joined to the host by a cable of its own."""

    name: str
    cable: str
    host: str
    """The host's address on the cable."""

    async def unplug(self, for_s: float) -> None:
        """No packet passes, and nobody is told."""
        await _run("ip", "link", "set", self.cable, "down")
        try:
            await asyncio.sleep(for_s)
        finally:
            await _run("ip", "link", "set", self.cable, "up")

    async def disturb(self, for_s: float) -> None:
        """Packets are late, lost, doubled and out of order.

        Raises:
            Unavailable: the kernel has no netem.
        """
        where = ("dev", self.cable, "root")
        await _run("tc", "qdisc", "add", *where, "netem", *NETEM.split())
        try:
            await asyncio.sleep(for_s)
        finally:
            await _run("tc", "qdisc", "del", *where)


@asynccontextmanager
async def a_namespace(number: int) -> AsyncGenerator[Namespace, None]:
    """A namespace that is gone at the end; `number` tells those of one process apart.

    Raises:
        Unavailable: there can be none here.
    """
    own = (os.getpid() * 101 + number) % 50_000
    name, cable, inside = f"sw{own}", f"swh{own}", f"swd{own}"
    network = f"10.{200 + own % 50}.{own // 50 % 250}"
    made = Namespace(name, cable, f"{network}.1")
    await _run("ip", "netns", "add", name)
    try:
        await _run("ip", "link", "add", cable, "type", "veth", "peer", "name", inside)
        await _run("ip", "link", "set", inside, "netns", name)
        await _run("ip", "addr", "add", f"{made.host}/30", "dev", cable)
        await _run("ip", "link", "set", cable, "up")
        await _run("ip", "-n", name, "addr", "add", f"{network}.2/30", "dev", inside)
        await _run("ip", "-n", name, "link", "set", inside, "up")
        await _run("ip", "-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        await _run("ip", "netns", "del", name)  # and the cable with it


async def _run(*command: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from error
    _, said = await process.communicate()
    if process.returncode:
        raise Unavailable(f"{' '.join(command)}: {said.decode().strip()}")


def enter(name: str) -> None:
    """This process, which has one thread, is in the namespace from now on."""
    descriptor = os.open(NAMESPACES / name, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)
    finally:
        os.close(descriptor)
