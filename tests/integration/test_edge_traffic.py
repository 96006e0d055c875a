"""A device tells the bytes of its link, and does not talk for their sake."""

import asyncio
from pathlib import Path

from deploy.demo.processes import Child
from shared import nats_bus, subjects
from shared.broker import BrokerProcess
from shared.bus import Bus
from shared.codec import decode, encode
from shared.log import ensure_streams
from shared.messages import STOPPED, ComeBack, DeviceReport
from tests.support.waiting import wait_until

PERIOD_S = 0.3


async def test_an_idle_device_reports_its_bytes_with_other_news_and_not_as_news(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    requests: list[bytes] = []
    reports: list[DeviceReport] = []

    async def answer(bus: Bus) -> None:
        async with bus.subscribe(subjects.ALL_WORK) as asked:
            async for request in asked:
                requests.append(request.data)
                come_back = ComeBack(after_s=0.05, reason="no job is running")
                await bus.publish(request.reply, encode(come_back))

    async def hear(bus: Bus) -> None:
        async with bus.subscribe(subjects.ALL_REPORTS) as heard:
            async for delivery in heard:
                report = decode(delivery.data, DeviceReport)
                reports.append(report)

    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    arguments = ["--device", "phone", "--servers", broker.url, "--engine", "fake"]
    arguments += ["--data", str(data), "--state-dir", str(tmp_path / "state")]
    arguments += ["--report-every-s", str(PERIOD_S)]
    device = Child("phone", "edge_client", arguments, tmp_path / "phone.log")
    bus = await nats_bus.connect([broker.url], name="test")
    await ensure_streams(bus)
    try:
        async with asyncio.TaskGroup() as tasks:
            talking = [tasks.create_task(answer(bus)), tasks.create_task(hear(bus))]
            await bus.flush()
            await device.start()
            await wait_until(lambda: len(requests) > 10, timeout_s=20.0)
            said, asked = len(reports), len(requests)
            await asyncio.sleep(5 * PERIOD_S)
            assert len(requests) > asked + 5
            assert len(reports) == said
            await device.stop()
            await wait_until(lambda: reports[-1].problem.endswith(STOPPED))
            for task in talking:
                task.cancel()
    finally:
        await device.kill()
        await bus.close()
    assert reports[-1].counters["link_bytes_out"] > sum(len(one) for one in requests)
    assert reports[-1].counters["link_bytes_in"] > 0
