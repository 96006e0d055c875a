"""Each service killed with SIGKILL in the middle of a round, and started again at once.

What is timed is from the kill to the next useful message:

    aggregator, broker   the next fact of the job in the log
    scheduler            the next piece of work given to a device
    telemetry            its page of the job has the round that was open at the kill
    edge                 the next update of that device
    proxy_inference      the next completion

`recovery.digest_equal` is 1 if the log before every kill is a prefix of the log after, and each
device, each reader of the log and each reader of a part of it come to the digests it names.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from deploy.demo.processes import ROOT, Child
from services.console.addresses import free_port
from shared import subjects
from shared.bus import SEQUENCE_HEADER
from shared.codec import decode, encode
from shared.messages import (
    EpochOpened,
    JobEnded,
    JobSpec,
    LogEvent,
    Message,
    Pacing,
    RoundClosed,
    StopJob,
    Tuning,
)
from tests.bench.figure import Figure
from tests.chaos.live.recording import Copy, copied
from tests.support.fleet import Fleet, a_fleet, a_task
from tests.support.jobs import adapter_after
from tests.support.waiting import wait_until

KILLS = 20
DEVICES = 3
PASS_S = 0.02
"""What a pass of the engine takes: rounds are long enough to be killed in."""
JOB = "recovery"
MODEL = ROOT / "deploy/demo/model/seedwire-demo-q8_0.gguf"
PATIENCE_S = 60.0

Kill = Callable[[], Awaitable[None]]


@dataclass
class Ear:
    """What was heard last of each kind, and an event for whoever waits for the next."""

    sequence: int = 0
    news: dict[str, asyncio.Event] = field(default_factory=dict[str, asyncio.Event])

    def wait_for(self, subject: str) -> asyncio.Event:
        self.news[subject] = event = asyncio.Event()
        return event

    def heard(self, subject: str) -> None:
        if subject in self.news:
            self.news.pop(subject).set()


async def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        seconds, equal = await _fleet(Path(folder))
        seconds["proxy_inference"] = await _proxy(Path(folder))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return [
        Figure("recovery.seconds", max(medians.values()), "s"),
        *(Figure(f"recovery.seconds.{name}", median, "s") for name, median in medians.items()),
        *(Figure(f"recovery.worst_s.{name}", max(found), "s") for name, found in seconds.items()),
        Figure("recovery.kills", sum(map(len, seconds.values())), "kills"),
        Figure("recovery.digest_equal", float(equal), "bool", target=1),
    ]


async def _fleet(folder: Path) -> tuple[dict[str, list[float]], bool]:
    async with a_fleet(folder, devices=DEVICES, model={"delay_s": PASS_S}) as fleet:
        port = free_port()
        await fleet.services["telemetry"].stop()
        await fleet.start_service("telemetry", "--port", str(port))
        spec = JobSpec(
            task=a_task(),
            tuning=Tuning(how="exact", rounds=100_000, directions=64, normalise="rms", step=0.01),
            pacing=Pacing(enough_devices=DEVICES, enough_probes=64, deadline_s=10.0),
        )
        await fleet.submit(fleet.job(JOB, spec))
        ear = Ear()
        copies: list[Copy] = []
        async with aiohttp.ClientSession() as http, _listening(fleet, ear):
            page = f"http://127.0.0.1:{port}/jobs/{JOB}"
            seconds = {
                name: [await _recovered(fleet, ear, name, http, page, copies) for _ in range(KILLS)]
                for name in ("aggregator", "scheduler", "telemetry", "broker", "edge")
            }
        return seconds, await _one_digest(fleet, copies)


@asynccontextmanager
async def _listening(fleet: Fleet, ear: Ear) -> AsyncGenerator[None]:
    async def listen(subject: str, kind: str) -> None:
        async with fleet.bus.subscribe(subject, limit=100_000) as deliveries:
            async for delivery in deliveries:
                if kind == "fact":
                    ear.sequence = int(delivery.headers[SEQUENCE_HEADER])
                ear.heard(kind)

    async with asyncio.TaskGroup() as group:
        listeners = [
            group.create_task(listen(subjects.events(JOB), "fact")),
            group.create_task(listen(subjects.decision(JOB), "decision")),
            group.create_task(listen(subjects.update(JOB, "d1"), "update")),
        ]
        yield
        for listener in listeners:
            listener.cancel()


async def _recovered(
    fleet: Fleet, ear: Ear, name: str, http: aiohttp.ClientSession, page: str, copies: list[Copy]
) -> float:
    """Seconds from a kill of `name` to its next useful message."""
    before = ear.sequence
    await wait_until(lambda: ear.sequence > before + 4, timeout_s=PATIENCE_S, what="rounds go on")
    copies.append(await copied(fleet.broker.url))
    opened = ear.wait_for("fact")
    await opened.wait()  # somewhere in a round from here on
    round_at_kill = await _round(fleet)
    kind = {"aggregator": "fact", "broker": "fact", "scheduler": "decision", "edge": "update"}
    began = time.perf_counter()
    if name == "broker":
        await fleet.broker.kill()
        await wait_until(lambda: not fleet.bus.connected)  # what was under way has been heard
        useful = ear.wait_for("fact")
        await fleet.broker.start()
    else:
        child = fleet.devices["d1"] if name == "edge" else fleet.services[name]
        await child.kill()
        await fleet.bus.flush()  # what was under way has been heard
        useful = ear.wait_for(kind.get(name, "none"))
        await child.start()
    async with asyncio.timeout(PATIENCE_S):
        if name == "telemetry":
            await _shows(http, page, round_at_kill)
        else:
            await useful.wait()
    return time.perf_counter() - began


async def _round(fleet: Fleet) -> int:
    stored = await fleet.bus.get_last(subjects.LOG_STREAM, subjects.log(JOB))
    assert stored is not None
    return int(getattr(decode(stored.data, Message), "round", 0))


async def _shows(http: aiohttp.ClientSession, page: str, least: int) -> None:
    """Return when the page of the job has reached round `least`."""
    while True:
        try:
            async with http.get(page) as response:
                if response.status == 200 and _newest(await response.json()) >= least:
                    return
        except (aiohttp.ClientError, OSError):
            pass
        await asyncio.sleep(0.01)


def _newest(shown: Any) -> int:
    """The highest round that a page speaks of."""
    if isinstance(shown, dict):
        own = shown.get("round", 0)
        return max([own if isinstance(own, int) else 0, *map(_newest, shown.values())])
    return max(map(_newest, shown), default=0) if isinstance(shown, list) else 0


async def _one_digest(fleet: Fleet, copies: list[Copy]) -> bool:
    """Whether nothing of the log was ever lost or changed, and all read the same in it."""
    await fleet.bus.request(subjects.JOB_STOP, encode(StopJob(job=JOB)), timeout_s=10)
    events = await fleet.events_until(JOB)
    final = await copied(fleet.broker.url)
    prefixes = all(
        final[stream][: len(entries)] == entries
        for copy in copies
        for stream, entries in copy.items()
    )
    end = events[-1]
    assert isinstance(end, JobEnded)

    def all_there() -> bool:
        ends = {fleet.positions.get(f"{JOB}/{name}", "").split(":")[-1] for name in fleet.devices}
        return ends == {end.digest}

    await wait_until(all_there, timeout_s=PATIENCE_S, what="all devices at the end")
    stored = [decode(entry.data, Message) for entry in final[subjects.LOG_STREAM]]
    log = [event for event in stored if isinstance(event, LogEvent)]
    return prefixes and _replays(log, copies) and _digest(log) == end.digest


def _replays(log: list[LogEvent], copies: list[Copy]) -> bool:
    """Whether a replay of every copy ends at the digest of its last close."""
    for copy in copies:
        entries = [decode(entry.data, Message) for entry in copy[subjects.LOG_STREAM]]
        events = [event for event in entries if isinstance(event, LogEvent)]
        closes = [event for event in events if isinstance(event, RoundClosed)]
        if closes and _digest(events) != closes[-1].digest:
            return False
    return bool(log)


def _digest(events: list[LogEvent]) -> str:
    opened = next(event for event in events if isinstance(event, EpochOpened))
    return adapter_after(opened.manifest, events).digest()


async def _proxy(folder: Path) -> list[float]:
    """Seconds from each kill of a proxy under load to its next completion."""
    port = free_port()
    arguments = ["--port", str(port), "--state-dir", str(folder / "proxy"), "--threads", "1"]
    arguments += ["--model", str(MODEL), "--servers", "nats://127.0.0.1:9"]
    child = Child("proxy", "services.proxy_inference", arguments, folder / "proxy.log")
    await child.start()
    seconds: list[float] = []
    try:
        async with aiohttp.ClientSession() as http:
            await _completed(http, port)
            for _ in range(KILLS):
                busy = asyncio.ensure_future(_completed(http, port, max_tokens=200))
                await asyncio.sleep(0.05)
                began = time.perf_counter()
                await child.kill()
                await child.start()
                busy.cancel()
                await asyncio.gather(busy, return_exceptions=True)
                await _completed(http, port)
                seconds.append(time.perf_counter() - began)
    finally:
        await child.stop()
    return seconds


async def _completed(http: aiohttp.ClientSession, port: int, max_tokens: int = 4) -> None:
    """Return when a completion has come."""
    body = {"prompt": "the cat", "temperature": 0, "max_tokens": max_tokens}
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                url = f"http://127.0.0.1:{port}/v1/completions"
                async with http.post(url, json=body) as response:
                    if response.status == 200:
                        await response.read()
                        return
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(0.01)
