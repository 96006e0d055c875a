"""What the bus does where its client library does not do as asked."""

import asyncio

import nats.errors
import pytest

from shared import nats_bus
from shared.errors import TransientError


async def test_a_cancellation_that_the_client_swallows_ends_the_bus_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def deaf(*_: object, **__: object) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise nats.errors.Error("something else happened") from None

    async def closed(*_: object) -> None: ...

    monkeypatch.setattr("shared.nats_bus._Client.connect", deaf)
    monkeypatch.setattr("shared.nats_bus._Client.close", closed)
    async with asyncio.timeout(10):
        with pytest.raises(TransientError):
            await nats_bus.connect(["nats://127.0.0.1:1"], name="t", patience_s=0.05)
