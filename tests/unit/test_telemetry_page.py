"""The live page's data: where devices stand, what a page is told, and what a slow one costs."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientResponse, ClientSession

from services.telemetry import devices, live, state, view
from services.telemetry.__main__ import serving
from services.telemetry.journal import Journal
from services.telemetry.live import Live, Reader
from services.telemetry.service import Observer
from services.telemetry.state import State
from shared.clock import SystemClock
from shared.messages import (
    ConnectionRefused,
    Contribution,
    DecisionMade,
    DeviceReport,
    FoldedUpdate,
    JobEnded,
    JobOpened,
    JobSpec,
    RoundReport,
    ServiceReport,
    Task,
    UpdateSettled,
    UpdatesFolded,
)
from tests.support.facts import DIGEST, device_report, round_closed, round_opened
from tests.support.waiting import wait_until

DEADLINE_S = round_opened(1).deadline_s


def job_opened(job: str = "demo") -> JobOpened:
    return JobOpened(job=job, spec=JobSpec(task=Task(loss="tokens")))


def report(device: str, *, problem: str = "", **counters: int) -> DeviceReport:
    return device_report(device, counters=counters, problem=problem)


def decision(device: str, round: int = 1, *, job: str = "demo", plays: int = 2) -> DecisionMade:
    return DecisionMade(
        job=job,
        round=round,
        device=device,
        part=0,
        kind="probe",
        probes=8,
        reason="one of 3 called, wave 1",
        index=1.5 if plays else 0.0,
        mean=0.5 if plays else 0.0,
        plays=plays,
    )


def settled(device: str, outcome: Any = "folded", reason: str = "") -> UpdateSettled:
    return UpdateSettled(key=f"demo.0.1.{device}.0", outcome=outcome, reason=reason)


def folded(*names: str, round: int = 1) -> UpdatesFolded:
    rows = [FoldedUpdate(name, round, 0, "folded", probes=8) for name in names]
    return UpdatesFolded(job="demo", epoch=0, round=round, updates=rows)


def a_state(count: int = 0) -> State:
    """A job whose first round is open, and devices `d0` ..."""
    known = State()
    known.on_event(job_opened())
    known.on_event(round_opened(1))
    for number in range(count):
        known.on_device_report(report(f"d{number}"), 0.0)
    return known


def test_a_device_works_from_its_assignment_until_its_update_is_settled() -> None:
    known = a_state(1)
    assert known.devices["d0"].standing == "waiting"
    known.on_decision(decision("d0"), 1.0)
    assert (known.devices["d0"].standing, known.standings["working"]) == ("working", 1)
    known.on_settled("d0", UpdateSettled(key="demo.0.1.d0.7", outcome="duplicate"), 2.0)
    assert known.devices["d0"].standing == "working"  # that was another part
    known.on_settled("d0", settled("d0"), 3.0)
    assert (known.devices["d0"].standing, known.standings["working"]) == ("waiting", 0)


def test_a_device_that_never_brings_its_work_is_away_until_it_is_heard_of() -> None:
    known = a_state(1)
    known.on_decision(decision("d0"), 1.0)
    overdue = 1.0 + devices.OVERDUE_SHARE * DEADLINE_S + devices.OVERDUE_S
    known.on_time(overdue - 0.1)
    assert known.devices["d0"].standing == "working"
    known.on_time(overdue)
    assert known.devices["d0"].standing == "away"
    assert "round 1" in known.devices["d0"].why()
    known.on_device_report(report("d0"), 40.0)
    assert known.devices["d0"].standing == "waiting"


def test_what_a_device_says_of_itself_decides_where_it_stands() -> None:
    known = a_state()
    known.on_round_report(
        RoundReport(
            job="demo", epoch=0, round=1, contributions=[Contribution("old", 1, 8, 6, 0.5, 0.2, 0)]
        )
    )
    known.on_device_report(report("broken", problem="no model: name one with --models"), 0.0)
    known.on_device_report(report("gone", problem="stopped"), 0.0)
    unable = msgspec.structs.replace(report("partly"), unable={"demo": "too little memory"})
    known.on_device_report(unable, 0.0)
    stands = {name: row.standing for name, row in known.devices.items()}
    assert stands == {"old": "away", "broken": "problem", "gone": "away", "partly": "problem"}
    assert known.standings == {"working": 0, "waiting": 0, "away": 2, "problem": 2}


def test_what_a_device_could_not_do_for_a_job_is_no_problem_once_the_job_has_ended() -> None:
    known = a_state()
    unable = msgspec.structs.replace(report("d0"), unable={"demo": "no usable row"})
    known.on_device_report(unable, 0.0)
    assert known.standings["problem"] == 1
    known.on_event(JobEnded(job="demo", epoch=0, round=1, reason="stopped", digest="d" * 64))
    assert known.standings["problem"] == 0
    known.on_device_report(unable, 1.0)
    assert known.devices["d0"].standing == "waiting"
    (shown,) = view.everything(known, "demo", 1.0, "").devices
    assert isinstance(shown, view.ShownDevice)
    assert not shown.unable


def test_standings_add_up_when_devices_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_DEVICES", 3)
    known = a_state()
    for number in range(10):
        known.on_decision(decision(f"d{number}"), float(number))
        known.on_settled(f"d{number - 1}", settled(f"d{number - 1}"), float(number))
    assert sum(known.standings.values()) == len(known.devices) == 3
    known.on_time(1e6)
    assert known.standings["working"] == 0


def test_an_open_round_shows_what_has_come_and_its_close_has_the_last_word() -> None:
    known = a_state()
    known.on_updates_folded(folded("a", "b"))
    known.on_updates_folded(folded("a"))
    row = known.jobs["demo"].rounds[1]
    assert (row.devices, row.wanted, row.probes, row.wanted_probes) == (2, 3, 24, 24)
    known.on_event(round_closed(1, devices=3))
    known.on_updates_folded(folded("late-to-be-read"))
    assert row.devices == 3


def test_bytes_of_links_are_summed_over_restarts_of_a_device() -> None:
    known = a_state()
    for sent, connected in ((100, 1), (150, 2), (30, 0)):  # the last one has started anew
        known.on_device_report(report("d0", link_bytes_out=sent, reconnects=connected), 0.0)
    assert known.links == {"link_bytes_in": 0, "link_bytes_out": 180, "reconnects": 2}


def test_arms_are_bounded_over_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_ARMS", 4)
    known = a_state()
    for job in ("demo", "other"):
        for number in range(3):
            known.on_decision(decision(f"d{number}", job=job, plays=number), 0.0)
    assert list(known.arms) == [("demo", "d2"), ("other", "d0"), ("other", "d1"), ("other", "d2")]
    assert known.arms["other", "d0"].index is None  # never played: no bound is known
    assert known.arms["other", "d1"].index == 1.5


def test_a_reader_of_the_journal_misses_nothing_or_is_told_so() -> None:
    journal = Journal(limit=3)
    for name in ("a", "b", "a"):
        journal.mark("device", "", name)
    assert journal.since(0) == [("device", "", "b"), ("device", "", "a")]
    assert journal.since(2) == [("device", "", "a")]
    assert journal.since(journal.version) == []
    for name in ("c", "d"):
        journal.mark("device", "", name)  # `b` is forgotten
    assert journal.since(0) is None
    assert journal.since(2) == [("device", "", name) for name in ("a", "c", "d")]


def told(speaker: Live, reader: Reader) -> tuple[str, dict[str, Any]]:
    """The next event as the page would read it; empty name: none."""
    data = speaker.message(reader)
    return parsed(data) if data else ("", {})


def parsed(event: bytes) -> tuple[str, dict[str, Any]]:
    head, _, body = event.decode().partition("\n")
    return head.removeprefix("event: "), json.loads(body.removeprefix("data: "))


def a_speaker(count: int) -> tuple[Observer, Live]:
    observer = Observer()
    observer.state = a_state(count)
    return observer, Live(observer, SystemClock())


def test_a_page_is_told_everything_once_and_then_only_what_changed() -> None:
    observer, speaker = a_speaker(1000)
    reader = Reader("")
    name, first = told(speaker, reader)
    assert (name, first["chosen"], len(first["devices"])) == ("everything", "demo", 1000)
    assert told(speaker, reader) == ("", {})
    observer.state.on_decision(decision("d7"), 1.0)
    name, then = told(speaker, reader)
    assert (name, [row["device"] for row in then["devices"]]) == ("changed", ["d7"])
    assert (then["arms"][0]["device"], then["fleet"]["standings"]["working"]) == ("d7", 1)
    assert "rounds" not in then
    assert "counters" not in then


def test_changes_that_a_page_has_not_taken_become_one_row_each() -> None:
    observer, speaker = a_speaker(1000)
    reader = Reader("")
    _, first = told(speaker, reader)
    for second in range(20):
        for number in range(1000):
            observer.state.on_settled(f"d{number}", settled(f"d{number}"), float(second))
    data = speaker.message(reader)
    assert len(parsed(data)[1]["devices"]) == 1000
    assert len(data) < 1.2 * len(json.dumps(first, separators=(",", ":")))


def test_a_page_far_behind_is_told_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "SHOWN_DEVICES", 50)
    observer, speaker = a_speaker(10)
    reader = Reader("")
    told(speaker, reader)
    for number in range(100):
        observer.state.on_device_report(report(f"new{number}"), 0.0)
    name, then = told(speaker, reader)
    assert (name, len(then["devices"])) == ("everything", 50)
    assert then["fleet"]["devices"] == 110


def test_a_page_follows_the_newest_job_unless_it_asked_for_one() -> None:
    observer, speaker = a_speaker(0)
    follower, asker = Reader(""), Reader("demo")
    told(speaker, follower)
    told(speaker, asker)
    observer.state.on_event(job_opened("second"))
    observer.state.on_event(round_opened(5, job="second"))
    name, now = told(speaker, follower)
    assert (name, now["chosen"], [r["round"] for r in now["rounds"]]) == (
        "everything",
        "second",
        [5],
    )
    name, now = told(speaker, asker)
    assert (name, "rounds" in now, now["jobs"][-1]["job"]) == ("changed", False, "second")
    ended = JobEnded(job="second", epoch=0, round=5, reason="finished", digest=DIGEST)
    observer.state.on_event(ended)
    assert told(speaker, follower)[1]["chosen"] == "demo"  # which still runs


def test_refused_connections_are_shown_with_what_the_registrar_counted() -> None:
    observer, speaker = a_speaker(0)
    reader = Reader("")
    assert not told(speaker, reader)[1]["fleet"]["registrar"]
    counters = {"connections_refused": 7, "devices_revoked": 2}
    known = observer.state
    known.on_service_report(
        ServiceReport(service="registrar", version="0", uptime_s=1.0, counters=counters), 1.0
    )
    known.on_refused(ConnectionRefused(reason="its key was revoked", name="tablet", count=3), 1.0)
    _, now = told(speaker, reader)
    fleet, (refusal,) = now["fleet"], now["refused_connections"]
    assert (fleet["connections_refused"], fleet["devices_revoked"]) == (7, 2)
    assert (refusal["who"], refusal["reason"], refusal["count"]) == (
        "tablet",
        "its key was revoked",
        3,
    )
    known.on_settled("d0", settled("d0", "rejected", "wrong adapter"), 2.0)
    assert told(speaker, reader)[1]["refused_updates"][0]["reason"] == "wrong adapter"


def test_a_service_is_shown_with_when_it_said_how_long_it_had_been_up() -> None:
    observer, speaker = a_speaker(0)
    report = ServiceReport(service="scheduler", version="0", uptime_s=60.0, counters={})
    observer.state.on_service_report(report, 12.5)
    (shown,) = told(speaker, Reader(""))[1]["services"]
    assert (shown["heard"], shown["uptime_s"]) == (12.5, 60.0)


# Over HTTP


@asynccontextmanager
async def served(count: int) -> AsyncGenerator[tuple[Observer, int]]:
    observer = Observer()
    observer.state = a_state(count)
    async with serving(observer, "127.0.0.1", 0) as port:
        yield observer, port


async def next_event(response: ClientResponse) -> tuple[str, dict[str, Any]]:
    """The next one that says something."""
    while True:
        async with asyncio.timeout(5.0):
            event = await response.content.readuntil(b"\n\n")
        if event.startswith(b"event: "):
            return parsed(event)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "TICK_S", 0.02)
    monkeypatch.setattr(live, "PAGE_BYTES_PER_S", 1e9)


@pytest.mark.usefixtures("quick")
async def test_a_stream_begins_with_everything_also_after_a_reconnect() -> None:
    async with served(1000) as (observer, port), ClientSession() as client:
        url = f"http://127.0.0.1:{port}/events"
        for rounds in (1, 2):
            async with client.get(url) as response:
                assert response.content_type == "text/event-stream"
                name, first = await next_event(response)
                assert (name, len(first["devices"])) == ("everything", 1000)
                assert len(first["rounds"]) == rounds
                observer.state.on_event(round_opened(rounds + 1))
                name, then = await next_event(response)
                assert name == "changed"
                assert [row["round"] for row in then["rounds"]] == [rounds + 1]
                assert "devices" not in then


@pytest.mark.usefixtures("quick")
async def test_a_page_that_takes_nothing_is_dropped_and_keeps_nothing_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "STALLED_S", 0.5)
    made: list[Live] = []
    message = Live.message

    def counted(self: Live, reader: Reader) -> bytes:
        made.append(self)
        return message(self, reader)

    monkeypatch.setattr(Live, "message", counted)
    async with served(4000) as (observer, port):
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", port))
            deaf.sendall(b"GET /events HTTP/1.1\r\nHost: telemetry\r\n\r\n")
            await wait_until(lambda: bool(made))
            speaker, second = made[0], 0.0

            def dropped() -> bool:
                nonlocal second
                second += 1.0
                for number in range(4000):
                    observer.state.on_settled(f"d{number}", settled(f"d{number}"), second)
                return speaker.pages == 0

            await wait_until(dropped, what="the deaf page is dropped")
        assert second > 10  # it fell behind by far more
        assert len(made) < 10  # than was made for it


@pytest.mark.usefixtures("quick")
async def test_one_page_too_many_is_refused_until_another_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "MAX_PAGES", 1)
    async with served(1) as (_, port), ClientSession() as client:
        url = f"http://127.0.0.1:{port}/events"
        async with client.get(url) as response:
            await next_event(response)
            async with client.get(url) as refused:
                assert refused.status == 503
                assert "close one" in (await refused.json())["error"]

        async def accepted() -> bool:
            async with client.get(url) as response:
                return response.status == 200

        await wait_until(accepted, what="there is room again")


async def test_open_pages_do_not_hold_up_the_end() -> None:
    loop = asyncio.get_running_loop()
    async with ClientSession() as client:
        async with served(1) as (_, port):
            response = await client.get(f"http://127.0.0.1:{port}/events")
            await next_event(response)
            asked = loop.time()
        assert loop.time() - asked < 2.0
        response.close()


async def test_the_page_and_its_parts_may_run_and_load_nothing_foreign() -> None:
    async with served(0) as (_, port), ClientSession() as client:
        parts = [part.name for part in (Path(live.__file__).parent / "page").iterdir()]
        assert {"index.html", "page.js", "page.css"} <= set(parts)
        for path in ["/", *(f"/{part}" for part in parts if part != "index.html")]:
            async with client.get(f"http://127.0.0.1:{port}{path}") as response:
                assert response.status == 200
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "frame-ancestors 'none'" in policy
                assert "unsafe" not in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                tag = response.headers["ETag"]
                body = await response.text()
            assert "innerHTML" not in body
            assert "://" not in body.replace('"http://www.w3.org/2000/svg"', "")
            again = {"If-None-Match": tag}
            async with client.get(f"http://127.0.0.1:{port}{path}", headers=again) as response:
                assert response.status == 304
