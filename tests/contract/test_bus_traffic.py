"""What both buses say of the bytes on their link, and how that reaches telemetry."""

import asyncio
import contextlib

import pytest

from shared import service, subjects
from shared.clock import SystemClock
from shared.codec import decode
from shared.memory_bus import MemoryBroker
from shared.messages import ServiceReport
from shared.metrics import Counters
from shared.service import report_counters
from tests.support.hubs import Hub
from tests.support.waiting import wait_until


async def test_bytes_are_counted_each_way_and_kept_over_a_reconnect(hub: Hub) -> None:
    alice, bob = await hub.connect("alice"), await hub.connect("bob")
    async with alice.subscribe("talk") as heard:
        await alice.flush()
        await bob.publish("talk", b"x" * 1000)
        await anext(heard)
        assert alice.traffic.bytes_in >= 1000
        assert bob.traffic.bytes_out >= 1000
        assert alice.traffic.bytes_out < 1000
        before, reconnects = bob.traffic, bob.reconnects
        await hub.restart()
        await wait_until(lambda: bob.reconnects > reconnects and alice.connected)
        await alice.flush()
        await bob.publish("talk", b"x" * 500)
        await anext(heard)
        assert bob.traffic.bytes_out >= before.bytes_out + 500
        assert alice.traffic.bytes_in >= 1500
    told = bob.traffic
    await bob.close()
    assert bob.traffic == told


async def test_a_service_reports_its_bytes_with_other_news_and_not_as_news() -> None:
    broker = MemoryBroker()
    bus, listener = broker.connect("service"), broker.connect("listener")
    counters = Counters()
    async with listener.subscribe(subjects.service("x")) as heard:
        telling = asyncio.create_task(report_counters(bus, "x", counters, SystemClock(), 0.005))
        first = decode((await anext(heard)).data, ServiceReport)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(heard)
                raise AssertionError("its own report was news to it")
        counters.add("work_assigned")
        second = decode((await anext(heard)).data, ServiceReport)
        telling.cancel()
    assert "link_bytes_out" not in first.counters  # nothing had been sent
    assert second.counters["link_bytes_out"] > 0


async def test_a_service_without_news_reports_again_for_who_listens_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "REPEAT_S", 0.05)
    broker = MemoryBroker()
    bus, listener = broker.connect("service"), broker.connect("listener")
    telling = asyncio.create_task(report_counters(bus, "x", Counters(), SystemClock(), 0.005))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(5.0), listener.subscribe(subjects.service("x")) as heard:
        report = decode((await anext(heard)).data, ServiceReport)
    telling.cancel()
    assert report.uptime_s > 0.0
