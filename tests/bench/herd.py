"""2,000 devices lose the broker and come back at once: how long until all of them are served.

Real connections to a real nats-server that is killed and started again, a real aggregator and
scheduler, a job whose round is open. Each device is a connection that does what the daemon does: it
connects again with the daemon's backoff, subscribes its own subjects, reports and asks for work,
again after 5 s if nobody answers; it is served when it has been given work, or a time to come back.
The baseline of the broker's memory is what it held before they came.
"""

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from msgspec.structs import replace

from deploy.demo.processes import Child
from shared import nats_bus, subjects
from shared.broker import BrokerProcess, start_broker
from shared.clock import backoff_s
from shared.codec import decode, encode
from shared.messages import ComeBack, Message, RequestWork, WorkAssigned
from tests.bench.crowd import resident_bytes, submitted
from tests.bench.figure import Figure
from tests.support.facts import device_report
from tests.support.jobs import a_job
from tests.support.light_nats import LightClient
from tests.support.waiting import wait_until

DEVICES = 2_000
ANSWER_S = 5.0
TURNS = 3
PATIENCE_S = 120.0


class Device:
    """One device's link, for as long as it is told to live."""

    def __init__(self, name: str, broker: BrokerProcess, told: Counter[str]) -> None:
        self.name = name
        self.served_at = 0.0
        self._broker = broker
        self._told = told
        self._inbox = f"_INBOX.{name}"
        self._gone = asyncio.Event()
        self._answered = asyncio.Event()

    async def live(self) -> None:
        attempt = 0
        while True:
            self._gone.clear()
            try:
                client = await LightClient.connect(
                    self._broker.host, self._broker.port, self._heard, self._gone.set
                )
            except OSError:
                await asyncio.sleep(backoff_s(attempt, first_s=0.05, cap_s=4.0))
                attempt += 1
                continue
            attempt = 0
            try:
                await self._come(client)
                await self._gone.wait()
            finally:
                client.abort()

    async def _come(self, client: LightClient) -> None:
        """What a daemon says when its link is back, until it is answered."""
        for subject in (
            subjects.settled(self.name),
            subjects.wake(self.name),
            subjects.events("herd"),
            f"{self._inbox}.*",
        ):
            client.subscribe(subject)
        report = device_report(self.name, cores=4, memory_mb=4096, rows=100, models=["a" * 64])
        client.publish(subjects.report(self.name), encode(report))
        request = encode(RequestWork(device=self.name, kinds=["probe"]))
        self._answered.clear()
        while not (self._answered.is_set() or self._gone.is_set()):
            self._told["requests"] += 1
            client.publish(subjects.work(self.name), request, f"{self._inbox}.1")
            answered = asyncio.ensure_future(self._answered.wait())
            gone = asyncio.ensure_future(self._gone.wait())
            both = {answered, gone}
            await asyncio.wait(both, timeout=ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
            for one in both:
                one.cancel()

    def _heard(self, subject: str, reply: str, data: bytes) -> None:
        if not subject.startswith(self._inbox):
            return
        if not data:  # the server says that nobody serves the subject yet
            self._told["nobody"] += 1
            return
        answer = decode(data, Message)
        self._told[type(answer).__name__] += 1
        if isinstance(answer, WorkAssigned) or (isinstance(answer, ComeBack) and not answer.report):
            self.served_at = time.perf_counter()
            self._answered.set()


async def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        async with start_broker(Path(name) / "nats") as broker, AsyncExitStack() as stack:
            services: list[Child] = []
            for service in ("aggregator", "scheduler"):
                arguments = ["--servers", broker.url, "--log-level", "warning"]
                log = Path(name) / f"{service}.log"
                child = Child(service, f"services.{service}", arguments, log)
                await child.start()
                stack.push_async_callback(child.stop)
                services.append(child)
            await _open(broker)
            return await _herd(broker, services[1])


async def _open(broker: BrokerProcess) -> None:
    """A job is running whose round wants a thousand devices."""
    job = a_job("herd", directions=512, d=1000)
    pacing = replace(job.spec.pacing, enough_devices=1000, enough_probes=2**40, deadline_s=3600.0)
    bus = await nats_bus.connect([broker.url], name="bench")
    try:
        await submitted(bus, replace(job, spec=replace(job.spec, pacing=pacing)))
    finally:
        await bus.close()


async def _herd(broker: BrokerProcess, scheduler: Child) -> list[Figure]:
    told: Counter[str] = Counter()
    idle = _peak_mb(broker.process_id)
    devices = [Device(f"herd-{number}", broker, told) for number in range(DEVICES)]
    seconds: list[float] = []
    held: list[float] = []
    async with asyncio.TaskGroup() as group:
        lives = [group.create_task(device.live()) for device in devices]
        await _served(devices, 0.0)
        for _ in range(TURNS):
            told.clear()
            await broker.kill()
            back = time.perf_counter()
            await broker.start()
            await _served(devices, back)
            seconds.append(max(device.served_at for device in devices) - back)
            held.append(_peak_mb(broker.process_id))
        for life in lives:
            life.cancel()
    assert scheduler.process is not None
    return [
        Figure("herd.seconds", statistics.median(seconds), "s", target=60),
        Figure("herd.seconds.worst", max(seconds), "s"),
        Figure("herd.server_rss_mb", max(held), "MB", idle),
        Figure("herd.devices", DEVICES, "devices"),
        Figure("herd.requests", told["requests"], "requests"),
        Figure("herd.work_assigned", told["WorkAssigned"], "answers"),
        Figure("herd.scheduler_rss_mb", resident_bytes(scheduler.process.pid) / 2**20, "MB"),
    ]


def _peak_mb(pid: int) -> float:
    """The most that the process has held in memory (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024


async def _served(devices: list[Device], since: float) -> None:
    """Every device has been served since then."""

    def all_served() -> bool:
        return all(device.served_at > since for device in devices)

    await wait_until(all_served, timeout_s=PATIENCE_S, what="all are served")
