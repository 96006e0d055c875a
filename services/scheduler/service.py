"""Bus to state and back: takes facts and requests, and sends what `state` decides."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from services.scheduler.config import Settings
from services.scheduler.state import State
from shared import subjects
from shared.bus import Bus, Delivery, Streams
from shared.clock import Clock
from shared.codec import check_sender, decode, encode
from shared.log import ensure_streams, follow_all, follow_detail, read_patiently
from shared.logs import get
from shared.messages import (
    ComeBack,
    DetailEvent,
    DeviceReport,
    ListDevices,
    LogEvent,
    Message,
    Refused,
    RequestWork,
    RoundOpened,
    WakeUp,
)
from shared.metrics import Counters
from shared.patience import patiently
from shared.runtime import Stop, settle
from shared.service import flushed, report_counters

log = get("scheduler")

TICK_S = 0.25
MAX_WAITING = 20_000
"""Requests and reports that may wait; a fleet that comes back at once asks again where dropped."""
EACH = 16
"""Of one device: a device asks one thing after the other."""
REFUSED_S = 60.0
"""When a device whose request cannot be read may ask again."""

Handler = Callable[[Delivery], Awaitable[object]]


class Scheduler:
    """All devices of one broker. Everything is decided in `state`, one message at a time."""

    def __init__(self, bus: Bus, streams: Streams, settings: Settings, clock: Clock) -> None:
        self.state = State(idle_comeback_s=settings.idle_comeback_s, seed=settings.seed)
        self.counters = Counters()
        self._bus = bus
        self._streams = streams
        self._settings = settings
        self._clock = clock

    async def serve(self, stop: Stop, ready: Callable[[], None] = lambda: None) -> None:
        """Rebuild the state from the log, then serve until `stop`."""
        await self._ensured()
        async with asyncio.TaskGroup() as tasks:
            replayed = asyncio.Event()
            background = [
                tasks.create_task(task)
                for task in (
                    self._take(subjects.ALL_WORK, self._on_request, replayed, "scheduler"),
                    self._take(subjects.DEVICE_LIST, self._on_list, replayed, "scheduler"),
                    self._take(subjects.ALL_REPORTS, self._on_report, replayed),
                )
            ]
            replaying = tasks.create_task(self._replay())
            stopping = tasks.create_task(stop.wait())
            await asyncio.wait({replaying, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if replaying.done() and not stop.asked:
                after_log, after_detail = replaying.result()
                background += [
                    tasks.create_task(self._follow_log(after_log)),
                    tasks.create_task(self._follow_detail(after_detail)),
                    tasks.create_task(self._ticks()),
                    tasks.create_task(
                        report_counters(
                            self._bus,
                            "scheduler",
                            self.counters,
                            self._clock,
                            self._settings.report_every_s,
                        )
                    ),
                ]
                replayed.set()
                ready()
                log.info("scheduler_ready", jobs=len(self.state.jobs))
            await stopping
            for task in (replaying, *background):
                task.cancel()
        await flushed(self._bus)

    # ---- what comes in

    async def _replay(self) -> tuple[int, int]:
        """Evolve over LOG, over DETAIL, and over each device's last report; where two ended."""
        after_log = await self._replay_stream(subjects.LOG_STREAM, subjects.ALL_LOGS)
        after_detail = await self._replay_stream(subjects.DETAIL_STREAM, subjects.ALL_DETAILS)
        await patiently(self._replay_reports, "read")
        return after_log, after_detail

    async def _replay_reports(self) -> None:
        """What an idle fleet said to a scheduler before this one; it says nothing by itself."""
        await self._ensured()  # it goes with the memory of a restarted broker
        reports = self._streams.read(subjects.REPORTS_STREAM, subjects.ALL_REPORTS)
        async with aclosing(reports) as stored:
            async for one in stored:
                await settle(self._told(one.subject, one.data), self.counters, what="report")

    async def _ensured(self) -> None:
        await ensure_streams(self._streams, self._settings.stream_replicas)

    async def _replay_stream(self, stream: str, pattern: str) -> int:
        position = 0
        async with aclosing(read_patiently(self._streams, stream, pattern)) as events:
            async for sequence, event in events:
                self.state.evolve(event, self._clock.now())
                position = sequence
        return position

    async def _follow_log(self, after: int) -> None:
        async with aclosing(follow_all(self._bus, self._streams, after)) as events:
            async for _, event in events:
                await settle(self._on_fact(event), self.counters, what="log")

    async def _follow_detail(self, after: int) -> None:
        async with aclosing(follow_detail(self._bus, self._streams, after)) as events:
            async for _, event in events:
                await settle(self._on_fact(event), self.counters, what="detail")

    async def _take(
        self, pattern: str, handler: Handler, replayed: asyncio.Event, queue: str = ""
    ) -> None:
        """Handle what comes on a subject; while the log is replayed it waits in the queue."""
        async with self._bus.subscribe(
            pattern, queue=queue, limit=MAX_WAITING, each=EACH
        ) as deliveries:
            await replayed.wait()
            async for delivery in deliveries:
                await handler(delivery)

    async def _on_fact(self, fact: LogEvent | DetailEvent) -> None:
        self.state.evolve(fact, self._clock.now())
        if isinstance(fact, RoundOpened):
            await self._call()

    async def _on_request(self, delivery: Delivery) -> None:
        outcome, reason = await settle(self._answer(delivery), self.counters, what="request")
        if outcome in ("rejected", "failed"):
            why = reason if outcome == "rejected" else "the scheduler failed; see its log"
            answer = ComeBack(after_s=REFUSED_S, reason=f"request refused: {why}"[:2000])
            await settle(self._reply(delivery, answer), self.counters, what="refusal")

    async def _answer(self, delivery: Delivery) -> None:
        request = decode(delivery.data, RequestWork)
        check_sender(delivery.subject, subjects.work(request.device))
        now = self._clock.now()
        self.counters.add("work_declined", bool(request.declined))
        self.state.evolve(request, now)
        answer = self.state.decide(request, now)
        if answer.decision is None:
            self.counters.add("comebacks")
        else:
            self.counters.add("work_assigned")
        if not isinstance(answer.message, ComeBack):
            self.state.evolve(answer.message, now)
        await self._reply(delivery, answer.message)
        if answer.decision is not None:
            subject = subjects.decision(answer.decision.job)
            await self._bus.publish(subject, encode(answer.decision))

    async def _on_report(self, delivery: Delivery) -> None:
        await settle(self._reported(delivery), self.counters, what="report")

    async def _reported(self, delivery: Delivery) -> None:
        device = await self._told(delivery.subject, delivery.data)
        if job := self.state.wanted_by(device, self._clock.now()):
            await self._wake(device, job)

    async def _told(self, subject: str, data: bytes) -> str:
        """The device that a report is of; the state knows what it says."""
        report = decode(data, DeviceReport)
        check_sender(subject, subjects.report(report.device))
        self.state.evolve(report, self._clock.now())
        return report.device

    async def _on_list(self, delivery: Delivery) -> None:
        outcome, reason = await settle(self._list(delivery), self.counters, what="list")
        if outcome == "rejected":
            await settle(self._reply(delivery, Refused(reason=reason)), self.counters, what="list")

    async def _list(self, delivery: Delivery) -> None:
        decode(delivery.data, ListDevices)
        await self._reply(delivery, self.state.listed(self._clock.now()))

    # ---- what follows

    async def _ticks(self) -> None:
        reconnects = self._bus.reconnects
        while True:
            if reconnects != self._bus.reconnects:
                reconnects = self._bus.reconnects
                await self._ensured()
            await settle(self._call(), self.counters, what="calls")
            await self._clock.sleep(TICK_S)

    async def _call(self) -> None:
        """Wake the devices that open rounds want now."""
        now = self._clock.now()
        for selection in self.state.plan(now):
            self.state.evolve(selection, now)
            names = self.state.called(selection, now)
            log.debug(
                "devices_called",
                job=selection.job,
                round=selection.round,
                wave=selection.wave,
                devices=len(names),
            )
            for name in names:
                await self._wake(name, selection.job)

    async def _wake(self, device: str, job: str) -> None:
        self.counters.add("wakeups")
        await self._bus.publish(subjects.wake(device), encode(WakeUp(job=job)))

    async def _reply(self, delivery: Delivery, answer: Message) -> None:
        if delivery.reply:
            await self._bus.publish(delivery.reply, encode(answer))
