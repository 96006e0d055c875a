"""A connection that ends in the middle of a send: nats-py then forgets to say that it has ended."""

# What nats-py has not sent yet is not for others to see.
# pyright: reportPrivateUsage=false

import asyncio
from typing import Any

import pytest

from shared import nats_bus
from tests.support.broker import BrokerProcess
from tests.support.proxy import start_proxy
from tests.support.waiting import wait_until


async def test_a_bus_cut_off_with_something_unsent_connects_again(
    broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_proxy(broker.port) as proxy:
        bus = await nats_bus.connect([f"nats://127.0.0.1:{proxy.port}"], name="test")
        try:
            client: Any = bus._client

            async def no_longer() -> None:
                raise ConnectionResetError("Connection lost")

            client._pending, client._pending_data_size = [b"PING\r\n"], 6
            monkeypatch.setattr(client._transport, "drain", no_longer)
            proxy.cut()
            await wait_until(lambda: bus.reconnects == 1, timeout_s=5, what="connected again")
            await bus.flush()
        finally:
            async with asyncio.timeout(10):
                await bus.close()
