"""The two brokers behind one face: what a contract test is given."""

from typing import Protocol

from shared.broker import BrokerProcess
from shared.bus import Link
from shared.memory_bus import MemoryBroker
from shared.nats_bus import connect


class Hub(Protocol):
    """A broker that clients connect to; un-acknowledged messages come again after 1 s."""

    async def connect(self, name: str) -> Link: ...

    async def restart(self) -> None:
        """Killed, and started again on the same port and store."""
        ...


class MemoryHub:
    def __init__(self) -> None:
        self.broker = MemoryBroker(ack_wait_s=1.0)

    async def connect(self, name: str) -> Link:
        return self.broker.connect(name)

    async def restart(self) -> None:
        self.broker.restart()


class NatsHub:
    def __init__(self, broker: BrokerProcess) -> None:
        self.broker = broker
        self.links: list[Link] = []

    async def connect(self, name: str) -> Link:
        link = await connect([self.broker.url], name=name, ack_wait_s=1.0)
        self.links.append(link)
        return link

    async def restart(self) -> None:
        await self.broker.kill()
        await self.broker.start()

    async def close(self) -> None:
        for link in self.links:
            await link.close()
