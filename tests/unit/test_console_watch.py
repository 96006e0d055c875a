"""What watching a job shows beside its rounds: the curve that grows, and whom a round waits for."""

import asyncio

import pytest
from msgspec.structs import replace

from services.console.waiting import Waiting
from services.console.watch import watch
from shared import subjects
from shared.codec import encode
from shared.messages import (
    AdapterEvaluated,
    DecisionMade,
    DevicesListed,
    DeviceSummary,
    JobEnded,
    RoundClosed,
    RoundOpened,
)
from tests.support.waiting import wait_until
from tests.unit.test_console_jobs import a_fleet, a_life, closed, evaluated, opened_last, paper

ESCAPE = "\x1b"


def opened(round: int) -> RoundOpened:
    return replace(opened_last(round), kind="tune", enough_devices=3, deadline_s=60.0)


def decision(device: str, round: int) -> DecisionMade:
    return DecisionMade(
        job="demo", round=round, device=device, part=0, kind="probe", probes=8, reason="its turn"
    )


def at_work(device: str, round: int, *, seen_s_ago: float = 1.0) -> DeviceSummary:
    doing = f"probe round {round} part 0"
    return DeviceSummary(device, seen_s_ago, job="demo", doing=doing)


def test_a_round_waits_for_those_at_work_and_those_not_heard_since_they_got_work() -> None:
    waiting = Waiting("demo")
    waiting.evolve(opened(7), now=100.0)
    for device, now in (("done", 101.0), ("slow", 101.0), ("gone", 102.0)):
        waiting.decided(decision(device, 7), now)
    waiting.decided(decision("late", 6), 102.0)  # of a round before
    devices = [
        DeviceSummary("done", 5.0),
        at_work("slow", 7),
        DeviceSummary("gone", 30.0),
        DeviceSummary("late", 500.0),
        at_work("elsewhere", 6),
        at_work("unseen", 7),  # its assignment came before we watched
    ]
    whom = waiting.for_whom(devices, now=132.0)
    assert whom == {"slow": "probe", "gone": "not heard since 30 s ago", "unseen": "probe"}
    assert waiting.told(whom, now=132.0) == (
        "round 7 is open for 32 s and closes by 60 s; it wants 3 devices; "
        "it waits for gone (not heard since 30 s ago), slow (probe), unseen (probe)"
    )


def test_where_too_few_are_heard_those_that_took_part_before_are_named() -> None:
    waiting = Waiting("demo")
    waiting.evolve(opened(7), now=100.0)  # wants three
    waiting.decided(decision("a", 7), 101.0)
    gone = DeviceSummary("gone", 50.0, rounds=6)
    never = DeviceSummary("never", 50.0)
    here = [DeviceSummary(name, 1.0, rounds=6) for name in ("a", "b", "c")]
    assert waiting.for_whom([gone, never, *here[:2]], now=120.0) == {
        "gone": "not heard since 50 s ago"
    }
    assert waiting.for_whom([gone, never, *here], now=120.0) == {}
    waiting.assigned.clear()  # we came when the round was open: who has delivered is not known
    assert waiting.for_whom([gone, never, *here[:2]], now=120.0) == {}


def test_long_is_longer_than_the_rounds_before() -> None:
    waiting, now = Waiting("demo"), 0.0
    for round in range(1, 6):
        waiting.evolve(opened(round), now)
        assert not waiting.long(now + 5.0)
        now += 30.0
        waiting.evolve(closed(round), now)
        assert not waiting.long(now + 1000.0)  # nothing is open
    waiting.evolve(opened(6), now)
    assert [waiting.long(now + seconds) for seconds in (30.0, 59.0, 61.0)] == [False, False, True]


async def test_a_long_round_says_once_whom_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.console.watch.QUIET_S", 0.01)
    monkeypatch.setattr("services.console.waiting.LONG_S", 0.0)
    listed = DevicesListed(devices=[at_work("till-3", 2)])
    async with a_fleet(*[listed] * 10_000) as (bus, log, services):
        life = a_life()
        for event in (life[0], opened(1), evaluated(1, correct=25), closed(1, loss=1.5)):
            await log.append("demo", event)
        printer, written = paper()
        watching = asyncio.create_task(watch(bus, "demo", printer))
        await wait_until(lambda: "round 1" in written.getvalue())
        await log.append("demo", opened(2))
        await bus.publish(subjects.decision("demo"), encode(decision("till-3", 2)))
        await wait_until(lambda: len(services.asked) > 5)
        await log.append("demo", life[-1])
        await watching
    told = [line for line in written.getvalue().splitlines() if "waits for" in line]
    assert len(told) == 1
    assert told[0].endswith("it wants 3 devices; it waits for till-3 (probe)")


@pytest.mark.parametrize("terminal", [True, False])
async def test_the_curve_of_held_out_accuracy_grows_in_a_terminal_and_ends_the_summary(
    terminal: bool,
) -> None:
    async with a_fleet() as (bus, log, _):
        events = [a_life()[0]]
        for round, correct in ((1, 10), (2, 40), (3, 90)):
            events += [opened(round), evaluated(round, correct=correct), closed(round, loss=1.0)]
        for event in events:
            await log.append("demo", event)
        printer, written = paper(terminal=terminal)
        watching = asyncio.create_task(watch(bus, "demo", printer))
        if terminal:
            await wait_until(lambda: "held-out accuracy ▁▄█ 0.9000" in written.getvalue())
            await log.append("demo", opened(4))
            await log.append("demo", evaluated(4, correct=10))
            await log.append("demo", closed(4, loss=1.0))
            await wait_until(lambda: "held-out accuracy ▁▄█▁ 0.1000" in written.getvalue())
        await log.append("demo", a_life()[-1])
        await watching
    shown = written.getvalue()
    (last,) = [line for line in shown.splitlines() if "held-out accuracy, by round" in line]
    assert ("▁▄█▁" if terminal else "▁▄█") in last
    assert terminal == (ESCAPE in shown)


async def test_without_held_out_rows_the_curve_is_that_of_the_devices_loss() -> None:
    async with a_fleet() as (bus, log, _):
        life = [event for event in a_life() if not isinstance(event, AdapterEvaluated)]
        assert isinstance(life[-1], JobEnded)
        assert [event.loss for event in life if isinstance(event, RoundClosed)][:2] == [1.5, 0.5]
        for event in life:
            await log.append("demo", event)
        printer, written = paper()
        await watch(bus, "demo", printer)
    assert "devices' loss, by round" in written.getvalue()
    assert "█▁" in written.getvalue()
