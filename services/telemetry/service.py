"""Bus to state: reads the logs from their beginning, listens to the rest, says if it is ready."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing

from services.telemetry.metrics import SERVICE
from services.telemetry.state import State
from shared import log as job_log
from shared import nats_bus, subjects
from shared.bus import Bus, Delivery, Link, Streams
from shared.clock import Clock, SystemClock
from shared.codec import check_sender, decode
from shared.credentials import Credentials
from shared.errors import InvalidUpdate, TransientError
from shared.logs import get
from shared.messages import (
    ConnectionRefused,
    DecisionMade,
    DetailEvent,
    DeviceReport,
    LogEvent,
    RoundReport,
    ServiceReport,
    UpdateSettled,
    UpdatesFolded,
)
from shared.metrics import Counters
from shared.runtime import project_version, settle

log = get("telemetry")

TICK_S = 1.0
EACH = 16
"""Reports of one device that may wait."""
OWN_REPORT_TICKS = 5


class Observer:
    """Feeds the state for as long as it runs; never writes."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._started = self._clock.now()
        self.state = State()
        self.counters = Counters()
        self._bus: Bus | None = None
        self._unread = {
            subjects.LOG_STREAM: "not asked for yet",
            subjects.DETAIL_STREAM: "not asked for yet",
        }
        """Why a stream's history has not been read to its end, by stream."""

    def not_ready(self) -> str:
        """Why what is shown may be incomplete; empty when it is not."""
        if self._bus is None:
            return "the broker has not been reached yet"
        if not self._bus.connected:
            return "the connection to the broker is lost; it is being tried again"
        return "; ".join(f"history of {name}: {why}" for name, why in self._unread.items())

    def counted(self) -> Mapping[str, int]:
        """This process's own counters."""
        counted = dict(self.counters.snapshot())
        malformed = counted.get("messages_malformed", 0) + sum(job_log.declined.values())
        counted["messages_malformed"] = malformed
        if self._bus is not None:
            counted["reconnects"] = self._bus.reconnects
            counted["deliveries_dropped"] = self._bus.dropped
            traffic = self._bus.traffic
            counted["link_bytes_in"] = traffic.bytes_in
            counted["link_bytes_out"] = traffic.bytes_out
        return counted

    async def run(self, servers: list[str], credentials: Credentials | None = None) -> None:
        """Connect, waiting for the broker if need be, and observe until cancelled."""
        bus = await nats_bus.connect(servers, name="telemetry", credentials=credentials)
        try:
            await self.observe(bus)
        finally:
            await bus.close()

    async def observe(self, bus: Link) -> None:
        """Take in all there is and all that comes."""
        self._bus = bus
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(bus, subjects.ALL_REPORTS, self._on_device))
            tasks.create_task(self._listen(bus, subjects.ALL_SERVICES, self._on_service))
            tasks.create_task(self._listen(bus, subjects.ALL_DECISIONS, self._on_decision))
            tasks.create_task(self._listen(bus, subjects.ALL_SETTLED, self._on_settled))
            tasks.create_task(self._listen(bus, subjects.REFUSED, self._on_refused))
            tasks.create_task(self._ticks())
            tasks.create_task(self._jobs(bus))
            tasks.create_task(self._details(bus))

    async def _jobs(self, bus: Link) -> None:
        after = await self._history(bus, subjects.LOG_STREAM, subjects.ALL_LOGS)
        async with aclosing(job_log.follow_all(bus, bus, after)) as events:
            async for _, event in events:
                await self._take(event)

    async def _details(self, bus: Link) -> None:
        after = await self._history(bus, subjects.DETAIL_STREAM, subjects.ALL_DETAILS)
        async with aclosing(job_log.follow_detail(bus, bus, after)) as events:
            async for _, event in events:
                await self._take(event)

    async def _history(self, streams: Streams, stream: str, subject: str) -> int:
        """The last sequence read, when all that was stored has been."""
        position = 0
        self._unread[stream] = "being read"
        while True:
            try:
                async with aclosing(job_log.read(streams, stream, subject, position)) as events:
                    async for sequence, event in events:
                        await self._take(event)
                        position = sequence
            except TransientError as error:
                self._unread[stream] = str(error)
                log.warning("history_unread", stream=stream, error=str(error))
                await asyncio.sleep(error.delay_s)
            else:
                del self._unread[stream]
                log.info("history_read", stream=stream, sequence=position)
                return position

    async def _take(self, event: LogEvent | DetailEvent) -> None:
        await settle(self._on_event(event), self.counters, what=type(event).__name__)

    async def _on_event(self, event: LogEvent | DetailEvent) -> None:
        if isinstance(event, RoundReport):
            self.state.on_round_report(event)
        elif isinstance(event, UpdatesFolded):
            self.state.on_updates_folded(event)
        else:
            self.state.on_event(event)

    async def _ticks(self) -> None:
        """What time alone changes: work that is overdue, and what telemetry says of itself."""
        tick = 0
        while True:
            now = self._clock.now()
            self.state.on_time(now)
            if tick % OWN_REPORT_TICKS == 0:
                own = ServiceReport(
                    service=SERVICE,
                    version=project_version(),
                    uptime_s=now - self._started,
                    counters=dict(self.counted()),
                )
                self.state.on_service_report(own, now)
            tick += 1
            await self._clock.sleep(TICK_S)

    async def _listen(self, bus: Bus, subject: str, handle: Callable[[Delivery], None]) -> None:
        async def handled(delivery: Delivery) -> None:
            handle(delivery)

        each = EACH if subject == subjects.ALL_REPORTS else 0
        async with bus.subscribe(subject, each=each) as deliveries:
            async for delivery in deliveries:
                await settle(handled(delivery), self.counters, what=subject)

    def _on_device(self, delivery: Delivery) -> None:
        report = decode(delivery.data, DeviceReport)
        check_sender(delivery.subject, subjects.report(report.device))
        self.state.on_device_report(report, self._clock.now())

    def _on_service(self, delivery: Delivery) -> None:
        report = decode(delivery.data, ServiceReport)
        check_sender(delivery.subject, subjects.service(report.service))
        if report.service == SERVICE:
            raise InvalidUpdate("a report of telemetry that it did not make")
        self.state.on_service_report(report, self._clock.now())

    def _on_decision(self, delivery: Delivery) -> None:
        self.state.on_decision(decode(delivery.data, DecisionMade), self._clock.now())

    def _on_settled(self, delivery: Delivery) -> None:
        settled = decode(delivery.data, UpdateSettled)
        device = subjects.last_token(delivery.subject)
        self.state.on_settled(device, settled, self._clock.now())

    def _on_refused(self, delivery: Delivery) -> None:
        self.state.on_refused(decode(delivery.data, ConnectionRefused), self._clock.now())
