"""The scheduler on a bus: facts come from the log, answers and calls go out."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from services.scheduler.config import Settings
from services.scheduler.service import Scheduler
from shared import subjects
from shared.clock import SystemClock
from shared.codec import decode, encode
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import (
    ComeBack,
    DecisionMade,
    DevicesListed,
    JobOpened,
    JobSpec,
    ListDevices,
    LogEvent,
    Message,
    Refused,
    RequestWork,
    ServiceReport,
    Task,
    UpdateKey,
    WakeUp,
    WorkAssigned,
)
from shared.runtime import Stop
from tests.support.facts import device_report, round_opened
from tests.support.waiting import wait_until

JOB = JobOpened(job="demo", spec=JobSpec(task=Task(loss="tokens")))
ROUND = round_opened(
    1, directions=64, batch_rows=8, enough_devices=1, enough_probes=8, deadline_s=60.0
)


class Field:
    """A broker with a log, a device's end of the talk, and schedulers to start and stop."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus: MemoryBus = self.broker.connect("devices")
        self.heard: list[tuple[str, bytes]] = []

    async def append(self, events: Sequence[LogEvent]) -> None:
        await ensure_streams(self.bus)
        writer = await LogWriter.open(self.bus, subjects.LOG_STREAM)
        for event in events:
            await writer.append(event.job, event)

    @asynccontextmanager
    async def scheduler(self) -> AsyncGenerator[Scheduler, None]:
        """One that serves; stopped at the end, which must be prompt."""
        bus = self.broker.connect("scheduler")
        settings = Settings(report_every_s=0.02, idle_comeback_s=100.0)
        scheduler = Scheduler(bus, bus, settings, SystemClock())
        stop, ready = Stop(), asyncio.Event()
        task = asyncio.create_task(scheduler.serve(stop, ready.set))
        try:
            await asyncio.wait_for(ready.wait(), 5)
            yield scheduler
        finally:
            stop.set()
            await asyncio.wait_for(task, 5)
            await bus.close()

    @asynccontextmanager
    async def listening(self, *patterns: str) -> AsyncGenerator[None, None]:
        async def listen(pattern: str, subscribed: asyncio.Event) -> None:
            async with self.bus.subscribe(pattern) as deliveries:
                subscribed.set()
                async for one in deliveries:
                    self.heard.append((one.subject, one.data))

        events = [asyncio.Event() for _ in patterns]
        listeners = [
            asyncio.create_task(listen(*one)) for one in zip(patterns, events, strict=True)
        ]
        for event in events:
            await event.wait()
        try:
            yield
        finally:
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)

    def heard_on(self, subject: str) -> list[bytes]:
        return [data for where, data in self.heard if where == subject]

    async def send(self, subject: str, message: Message) -> None:
        await self.bus.publish(subject, encode(message))

    async def request(
        self, device: str, *, last: UpdateKey | None = None, data: bytes = b"", of: str = ""
    ) -> WorkAssigned | ComeBack:
        asked = RequestWork(device=of or device, kinds=["probe", "evaluate"], last=last)
        answer = await self.bus.request(subjects.work(device), data or encode(asked), timeout_s=5.0)
        message = decode(answer, Message)
        assert isinstance(message, WorkAssigned | ComeBack)
        return message


async def test_a_scheduler_that_was_restarted_calls_an_idle_fleet_that_it_has_never_heard() -> None:
    """Who waits to be called says nothing for a quarter of an hour."""
    field = Field()
    await field.append([JOB])
    await field.send(subjects.report("d0"), device_report("d0"))
    await field.bus.publish(subjects.report("d1"), b"no report")
    async with field.listening(subjects.wake("d0")), field.scheduler():
        await field.append([ROUND])
        await wait_until(lambda: bool(field.heard_on(subjects.wake("d0"))))


async def test_the_broker_keeps_reports_again_after_it_was_restarted() -> None:
    field = Field()
    await field.append([JOB])
    async with field.scheduler():
        field.broker.restart()
        await wait_until(lambda: subjects.REPORTS_STREAM in field.broker.streams)


async def test_a_device_that_waits_is_woken_as_a_round_opens_and_the_decision_is_told() -> None:
    field = Field()
    await field.append([JOB])
    listening = field.listening(subjects.ALL_DECISIONS, subjects.wake("d0"))
    async with listening, field.scheduler() as scheduler:
        await field.send(subjects.report("d0"), device_report("d0"))
        await wait_until(lambda: "d0" in scheduler.state.devices)
        waiting = await field.request("d0")
        assert isinstance(waiting, ComeBack)
        assert not waiting.report
        await field.append([ROUND])
        await wait_until(lambda: bool(field.heard_on(subjects.wake("d0"))))
        assert decode(field.heard_on(subjects.wake("d0"))[0], WakeUp).job == "demo"
        answer = await field.request("d0")
        assert isinstance(answer, WorkAssigned)
        await wait_until(lambda: bool(field.heard_on(subjects.decision("demo"))))
        told = decode(field.heard_on(subjects.decision("demo"))[0], DecisionMade)
        assert (told.device, told.round, told.part, told.probes) == ("d0", 1, 0, 8)
        assert told.reason
        counts = {name: scheduler.counters.get(name) for name in ("wakeups", "work_assigned")}
        assert counts == {"wakeups": 1, "work_assigned": 1}


async def test_an_unknown_device_is_woken_once_it_has_reported() -> None:
    field = Field()
    await field.append([JOB, ROUND])
    async with field.listening(subjects.wake("d0")), field.scheduler():
        answer = await field.request("d0")
        assert isinstance(answer, ComeBack)
        assert answer.report
        await field.send(subjects.report("d0"), device_report("d0"))
        await wait_until(lambda: bool(field.heard_on(subjects.wake("d0"))))
        assert isinstance(await field.request("d0"), WorkAssigned)


async def test_a_request_that_cannot_be_used_is_answered_with_what_is_wrong_and_counted() -> None:
    field = Field()
    async with field.scheduler() as scheduler:
        broken = await field.request("d0", data=b"\xc1")
        forged = await field.request("d0", of="d1")
        wrong = await field.request("d0", data=encode(ListDevices()))
        reasons = [each.reason for each in (broken, forged, wrong) if isinstance(each, ComeBack)]
        assert "not a message" in reasons[0]
        assert "belongs on seedwire.v1.work.d1 was sent on" in reasons[1]
        assert "ListDevices" in reasons[2]
        assert scheduler.counters.get("messages_malformed") == 3
        assert "d1" not in scheduler.state.devices
        await field.send(subjects.report("d0"), device_report("d1"))
        await wait_until(lambda: scheduler.counters.get("messages_malformed") == 4)
        assert not scheduler.state.devices


async def test_a_restarted_scheduler_goes_on_with_the_round_and_numbers_on() -> None:
    field = Field()
    await field.append([JOB, ROUND])
    async with field.scheduler():
        await field.send(subjects.report("d0"), device_report("d0"))
        first = await field.request("d0")
        assert isinstance(first, WorkAssigned)
    async with field.scheduler():
        second = await field.request("d0", last=first.key)
        assert isinstance(second, WorkAssigned)
        assert second.key.part == first.key.part + 1


async def test_rounds_of_the_past_wake_nobody() -> None:
    field = Field()
    await field.append([JOB, ROUND])
    async with field.listening("seedwire.v1.wake.*"), field.scheduler() as scheduler:
        await wait_until(lambda: bool(scheduler.state.jobs["demo"].open))
    assert field.heard == []


async def test_a_request_made_during_the_replay_is_answered_after_it() -> None:
    field = Field()
    await field.append([JOB, ROUND])
    bus = field.broker.connect("scheduler")
    scheduler, stop = Scheduler(bus, bus, Settings(), SystemClock()), Stop()
    task = asyncio.create_task(scheduler.serve(stop))
    await wait_until(lambda: len(field.broker.subscribers) >= 3)
    await field.send(subjects.report("d0"), device_report("d0"))
    answer = await field.request("d0")
    assert "no job" not in (answer.reason if isinstance(answer, ComeBack) else "")
    stop.set()
    await asyncio.wait_for(task, 5)


async def test_the_operator_lists_devices_and_telemetry_hears_counters() -> None:
    field = Field()
    async with field.listening(subjects.service("scheduler")), field.scheduler() as scheduler:
        await field.send(subjects.report("d0"), device_report("d0"))
        await wait_until(lambda: "d0" in scheduler.state.devices)
        data = await field.bus.request(subjects.DEVICE_LIST, encode(ListDevices()), timeout_s=5)
        (listed,) = decode(data, DevicesListed).devices
        assert (listed.device, listed.rows, listed.job) == ("d0", 10, "")
        refused = await field.bus.request(subjects.DEVICE_LIST, b"\xc1", timeout_s=5)
        assert "not a message" in decode(refused, Refused).reason
        await field.request("d0")

        def newest() -> int:
            heard = field.heard_on(subjects.service("scheduler"))
            return decode(heard[-1], ServiceReport).counters.get("comebacks", 0) if heard else 0

        await wait_until(lambda: newest() == 1)
