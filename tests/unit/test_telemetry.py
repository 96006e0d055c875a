"""Telemetry: what is remembered, what it says to Prometheus and over HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from services.telemetry import history, state
from services.telemetry.__main__ import serving
from services.telemetry.metrics import exposition
from services.telemetry.service import Observer
from services.telemetry.state import State
from shared import subjects
from shared.codec import encode
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import (
    AdapterEvaluated,
    Contribution,
    DecisionMade,
    DeviceReport,
    JobEnded,
    JobOpened,
    JobSpec,
    LogEvent,
    RoundReport,
    ServiceReport,
    Task,
    Tuning,
    UpdateSettled,
)
from shared.metrics import COUNTERS
from tests.support.facts import DIGEST, device_report, round_closed, round_opened
from tests.support.waiting import wait_until

LABELLED = Task(loss="choices", template="{text}", labels={"a": "yes", "b": "no"})


def opened(job: str = "demo", rounds: int = 3, task: Task = LABELLED) -> JobOpened:
    return JobOpened(job=job, spec=JobSpec(task=task, tuning=Tuning(rounds=rounds)))


def evaluated(round: int, correct: int, examples: int, loss: float) -> AdapterEvaluated:
    return AdapterEvaluated(
        job="demo",
        epoch=0,
        round=round,
        digest=DIGEST,
        examples=examples,
        correct=correct,
        weight=examples,
        loss=loss,
        detail_sequence=1,
    )


def a_report(device: str, **counters: int) -> DeviceReport:
    return device_report(device, counters=counters)


def a_round_report(round: int) -> RoundReport:
    contribution = Contribution("phone", 1, 8, 6, 0.5, 0.25, 0)
    return RoundReport(job="demo", epoch=0, round=round, contributions=[contribution])


def samples(known: State) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample of the exposition, by name and values of its labels in their order."""
    text = exposition(known, {"messages_malformed": 3}).decode()
    return {
        (sample.name, tuple(v for _, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_job_is_remembered_round_by_round() -> None:
    known = State()
    for event in (
        opened(),
        round_opened(1),
        round_closed(1, loss=2.0),
        round_opened(2),
        round_closed(2),
    ):
        known.on_event(event)
    job = known.jobs["demo"]
    assert [row.loss for row in job.rounds.values()] == [2.0, 1.0]
    assert job.rounds[2].reason == "enough"
    assert (job.loss, job.round, job.closed) == (1.0, 2, {"enough": 2})
    known.on_event(JobEnded(job="demo", epoch=0, round=2, reason="finished", digest=DIGEST))
    assert job.summary()["status"] == "ended"


def test_evaluations_of_a_round_are_pooled_by_weight() -> None:
    known = State()
    known.on_event(evaluated(4, correct=1, examples=2, loss=2.0))
    known.on_event(evaluated(4, correct=6, examples=6, loss=2.0))
    last = known.jobs["demo"].evaluation
    assert last is not None
    assert (last.accuracy, last.loss) == (7 / 8, 0.5)


def test_the_oldest_rounds_are_dropped_past_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_ROUNDS", 5)
    known = State()
    for round in range(1, 12):
        known.on_event(round_opened(round))
        known.on_event(round_closed(round))
    known.on_round_report(a_round_report(1))
    assert list(known.jobs["demo"].rounds) == [7, 8, 9, 10, 11]
    assert known.jobs["demo"].closed == {"enough": 11}


def test_a_round_report_that_comes_again_counts_once() -> None:
    known = State()
    for _ in range(2):
        known.on_round_report(a_round_report(1))
    known.on_round_report(a_round_report(2))
    assert (known.devices["phone"].rounds, known.devices["phone"].probes) == (2, 16)


def test_the_device_not_heard_of_for_longest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_DEVICES", 3)
    known = State()
    for device in ("a", "b", "c", "a", "d"):
        known.on_device_report(a_report(device), 0.0)
    assert list(known.devices) == ["c", "a", "d"]


def test_every_counter_there_is_becomes_a_metric_that_prometheus_reads() -> None:
    known = State()
    counters = {name: number for number, name in enumerate(COUNTERS, start=1)}
    known.on_service_report(
        ServiceReport(service="aggregator", version="0", uptime_s=1.0, counters=counters), 0.0
    )
    known.on_device_report(a_report("phone", updates_sent=7, of_a_later_version=1), 0.0)
    read = samples(known)
    for name, number in counters.items():
        assert read[f"seedwire_{name}_total", ("", "aggregator")] == number
    assert read["seedwire_updates_sent_total", ("phone", "")] == 7
    assert read["seedwire_messages_malformed_total", ("", "telemetry")] == 3


def test_jobs_become_gauges() -> None:
    known = State()
    for event in (opened(), round_opened(1), round_closed(1, loss=1.5), evaluated(1, 3, 4, 8.0)):
        known.on_event(event)
    read = samples(known)
    assert read["seedwire_job_round", ("demo",)] == 1
    assert read["seedwire_job_loss", ("demo",)] == 1.5
    assert read["seedwire_job_accuracy", ("demo",)] == 0.75
    assert read["seedwire_job_heldout_loss", ("demo",)] == 2.0
    assert read["seedwire_job_rounds_closed_total", ("demo", "enough")] == 1


def test_a_job_without_right_answers_has_no_accuracy() -> None:
    known = State()
    known.on_event(opened(task=Task(loss="tokens")))
    known.on_event(evaluated(1, correct=0, examples=4, loss=8.0))
    read = samples(known)
    assert ("seedwire_job_accuracy", ("demo",)) not in read
    assert read["seedwire_job_heldout_loss", ("demo",)] == 2.0
    told = known.jobs["demo"].summary()
    assert (told["accuracy"], told["heldout_loss"], told["has_answers"]) == (None, 2.0, False)


def test_devices_without_series_of_their_own_are_summed_over_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "MAX_SERIES", 1)
    known = State()
    for report in (
        a_report("first", updates_sent=100),
        a_report("second", updates_sent=5),
        a_report("third", updates_sent=1),
        a_report("second", updates_sent=2),  # started anew
        a_report("second", updates_sent=4),
    ):
        known.on_device_report(report, 0.0)
    read = samples(known)
    assert read["seedwire_updates_sent_total", ("first", "")] == 100
    assert read["seedwire_updates_sent_total", ("_others", "")] == 5 + 1 + 2 + 2


@asynccontextmanager
async def watched() -> AsyncGenerator[tuple[MemoryBroker, MemoryBus, Observer, str], None]:
    """A broker with some history, an observer of it, and where its pages are."""
    broker = MemoryBroker()
    writer = broker.connect("writer")
    await ensure_streams(writer)
    log = await LogWriter.open(writer, subjects.LOG_STREAM)
    history: list[LogEvent] = [opened(), round_opened(1), round_closed(1)]
    for event in history:
        await log.append("demo", event)
    observer = Observer()
    async with serving(observer, "127.0.0.1", 0) as port:
        yield broker, writer, observer, f"http://127.0.0.1:{port}"


@asynccontextmanager
async def watching() -> AsyncGenerator[tuple[MemoryBus, Observer, str], None]:
    """The same, with the observer running and all history read."""
    async with (
        watched() as (broker, writer, observer, url),
        running(observer, broker.connect("telemetry")),
    ):
        await wait_until(lambda: not observer.not_ready())
        yield writer, observer, url


@asynccontextmanager
async def running(observer: Observer, bus: MemoryBus) -> AsyncGenerator[None, None]:
    task = asyncio.create_task(observer.observe(bus))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_it_is_ready_only_with_a_broker_and_all_history_read() -> None:
    async with watched() as (broker, _, observer, url), ClientSession() as client:

        async def status(path: str) -> int:
            async with client.get(url + path) as response:
                return response.status

        assert (await status("/healthz"), await status("/readyz")) == (200, 503)
        async with running(observer, broker.connect("telemetry")):
            await wait_until(lambda: not observer.not_ready())
            assert await status("/readyz") == 200
            broker.partition("telemetry")
            assert await status("/readyz") == 503
            async with client.get(url + "/readyz") as response:
                assert "lost" in (await response.json())["reason"]


async def test_pages_show_history_and_what_happens_after_it() -> None:
    async with watching() as (writer, observer, url), ClientSession() as client:
        log = await LogWriter.open(writer, subjects.LOG_STREAM)
        await log.append("demo", round_opened(2))
        await wait_until(lambda: observer.state.jobs["demo"].round == 2)
        async with client.get(url + "/jobs/demo") as response:
            job = await response.json()
        assert [row["round"] for row in job["rounds"]] == [1, 2]
        async with client.get(url + "/jobs") as response:
            assert [row["job"] for row in (await response.json())["jobs"]] == ["demo"]
        async with client.get(url + "/jobs/nobody") as response:
            assert response.status == 404
            assert (await response.json())["known"] == ["demo"]
        async with client.get(url + "/nowhere") as response:
            assert (response.status, response.content_type) == (404, "application/json")


async def test_what_cannot_be_decoded_is_counted_and_costs_nothing_else() -> None:
    async with watching() as (writer, observer, url), ClientSession() as client:
        before = observer.counted()["messages_malformed"]
        for subject in ("report.phone", "service.x", "decision.demo", "settled.phone"):
            await writer.publish(f"{subjects.PREFIX}.{subject}", b"\xc1 rubbish")
        await writer.publish(subjects.report("thief"), encode(a_report("phone")))
        decision = DecisionMade(
            job="demo", round=1, device="phone", part=0, kind="probe", probes=8, reason="first"
        )
        await writer.publish(subjects.decision("demo"), encode(decision))
        settled = UpdateSettled(key="demo.0.1.phone.0", outcome="folded")
        await writer.publish(subjects.settled("phone"), encode(settled))
        await writer.publish(subjects.report("tablet"), encode(a_report("tablet")))
        await wait_until(lambda: "tablet" in observer.state.devices)
        await wait_until(lambda: observer.state.decisions == {"probe": 1})
        await wait_until(lambda: observer.state.settled == {"folded": 1})
        assert observer.counted()["messages_malformed"] == before + 5
        assert observer.state.devices["phone"].report is None
        async with client.get(url + "/devices") as response:
            names = [row["device"] for row in (await response.json())["devices"]]
        assert sorted(names) == ["phone", "tablet"]
        async with client.get(url + "/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert 'seedwire_decisions_total{kind="probe"} 1.0' in await response.text()
