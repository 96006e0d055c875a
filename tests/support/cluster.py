"""Three nats-servers that are one broker, on links of their own that a test can cut."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shared.broker import BrokerProcess
from shared.errors import TransientError
from shared.nats_bus import NatsBus
from tests.deploy.containers import free_port
from tests.support.proxy import Proxy, on_a_port

SERVERS = 3


class Gate(Proxy):
    """A link that can also be shut: no connection lasts, and no new one comes about."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self._is_shut = False

    def shut(self) -> None:
        self._is_shut = True
        self.cut()

    def open(self) -> None:
        self._is_shut = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_shut:
            writer.transport.abort()
            return
        await super().serve(reader, writer)
        if self._is_shut:  # meanwhile
            self.cut()


def start_gate(target_port: int) -> AbstractAsyncContextManager[Gate]:
    """An open gate on a port of its own."""
    return on_a_port(Gate(target_port))


@dataclass
class Cluster:
    """The servers, and the gates that routes between them go through."""

    nodes: list[BrokerProcess]
    gates: dict[tuple[int, int], Gate]

    @property
    def servers(self) -> list[str]:
        return [node.url for node in self.nodes]

    def cut_off(self, number: int) -> None:
        """Node `number` and the others hear nothing of each other."""
        for pair, gate in self.gates.items():
            if number in pair:
                gate.shut()

    def heal(self) -> None:
        for gate in self.gates.values():
            gate.open()

    async def leader(self, bus: NatsBus, stream: str) -> int:
        """The node that leads the stream; waits until there is one."""
        async with asyncio.timeout(30):
            while True:
                name = (await stream_info(bus, stream, "cluster")).get("leader", "")
                if name:
                    return int(str(name).removeprefix("node-"))
                await asyncio.sleep(0.05)


async def stream_info(bus: NatsBus, stream: str, part: str) -> dict[str, Any]:
    """What is said of the stream: its `config`, or its `cluster`; empty where nobody answers."""
    try:
        reply = await bus.ask(f"$JS.API.STREAM.INFO.{stream}", b"", timeout_s=2.0)
    except TransientError:
        return {}
    answer: dict[str, Any] = msgspec.json.decode(reply.data)
    return answer.get(part) or {}


async def in_step(bus: NatsBus, stream: str) -> bool:
    """Whether every follower of the stream is there and has all of it."""
    found = await stream_info(bus, stream, "cluster")
    followers = found.get("replicas") or []
    return len(followers) == SERVERS - 1 and all(
        one.get("current") and not one.get("offline") and not one.get("lag") for one in followers
    )


def _routes(number: int, port: int, gates: dict[tuple[int, int], Gate]) -> str:
    others = [gate.port for (near, _), gate in gates.items() if near == number]
    routes = ", ".join(f'"nats://127.0.0.1:{other}"' for other in others)
    # Servers tell each other where they listen: a port where nobody does, so all go by the gates.
    return f"""\
server_name: node-{number}
cluster {{
  name: seedwire
  listen: "127.0.0.1:{port}"
  advertise: "127.0.0.1:1"
  pool_size: -1
  routes: [{routes}]
}}
"""


@asynccontextmanager
async def start_cluster(folder: Path) -> AsyncGenerator[Cluster, None]:
    """Three servers with JetStream that know each other."""
    ports = [free_port() for _ in range(SERVERS)]
    async with AsyncExitStack() as stack:
        gates = {
            (near, far): await stack.enter_async_context(start_gate(ports[far]))
            for near in range(SERVERS)
            for far in range(SERVERS)
            if near != far
        }
        nodes: list[BrokerProcess] = []
        for number, port in enumerate(ports):
            node = BrokerProcess(folder / f"node-{number}", security=_routes(number, port, gates))
            stack.push_async_callback(node.kill)
            nodes.append(node)
        await asyncio.gather(*(node.start() for node in nodes))
        yield Cluster(nodes, gates)
