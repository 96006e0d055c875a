"""How a round's work is spread over devices of mixed speeds: simulated fleets, pure state."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import pytest
from msgspec.structs import replace

from services.scheduler.cost_model import WORTHWHILE_PROBES
from shared.messages import RoundOpened, WorkAssigned
from shared.ranges import width
from tests.unit.test_scheduler_state import (
    Fleet,
    a_close,
    a_job,
    a_report,
    a_round,
    directions_of,
    folded,
    ranges_of,
)

TICK_S = 0.25


@dataclass
class Played:
    """What became of one round."""

    called: list[str]
    """As it opened."""
    ended_s: float = float("inf")
    parts: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Of each device, how many probes each part had."""
    overdue: list[str] = field(default_factory=list[str])
    """Who was given more than it finishes by the deadline."""

    def probes(self, device: str) -> int:
        return sum(self.parts.get(device, []))


def play(paces: Mapping[str, float], opened: RoundOpened, *, gone: str = "") -> Played:
    """One round of devices that take `paces` seconds a probe, and have said so.

    `gone` takes its work and is never heard again.
    """
    fleet = Fleet(a_job(), *(a_report(name, probe_s=pace) for name, pace in paces.items()), opened)
    played, probes, delivered = Played(fleet.call()), 0, set[str]()
    due: list[tuple[float, str, WorkAssigned | None]] = [(0.0, n, None) for n in played.called]
    due += [(tick * TICK_S, "", None) for tick in range(1, int(opened.deadline_s / TICK_S))]
    heapify(due)
    while due:
        fleet.now, name, done = heappop(due)
        if not name:
            for woken in fleet.call():
                heappush(due, (fleet.now, woken, None))
            continue
        if done is not None:
            probes += width(ranges_of(done))
            delivered.add(name)
            fleet.evolve(folded(done, work_s=paces[name] * width(ranges_of(done))))
            if probes >= opened.enough_probes and len(delivered) >= opened.enough_devices:
                played.ended_s = fleet.now
                return played
        answer = fleet.ask(name, last=None if done is None else done.key)
        if isinstance(answer, WorkAssigned):
            count = width(ranges_of(answer))
            played.parts.setdefault(name, []).append(count)
            ends = fleet.now + count * paces[name]
            if ends > opened.deadline_s:
                played.overdue.append(name)
            if name != gone:
                heappush(due, (ends, name, answer))
    return played


def shortest(paces: Mapping[str, float], called: list[str], opened: RoundOpened) -> float:
    """No schedule of these devices has enough probes of enough devices before this time."""
    speeds = sorted(paces[name] for name in called)
    low, high = 0.0, opened.enough_probes * speeds[0]
    for _ in range(60):
        middle = (low + high) / 2
        if sum(int(middle / pace) for pace in speeds) >= opened.enough_probes:
            high = middle
        else:
            low = middle
    return max(high, speeds[opened.enough_devices - 1])


def a_mixed_fleet(rng: random.Random) -> tuple[dict[str, float], RoundOpened]:
    """Speeds over two orders of magnitude, and a round that such devices can do."""
    size = rng.randint(3, 24)
    paces = {f"d{number}": 10 ** rng.uniform(-1.5, 0.5) for number in range(size)}
    opened = a_round(devices=rng.randint(1, size), probes=rng.choice([8, 32, 64, 256]), pool=2048)
    return paces, replace(opened, deadline_s=600.0)


@pytest.mark.parametrize("seed", range(100))
def test_a_round_of_mixed_devices_takes_at_most_twice_the_shortest_time(seed: int) -> None:
    paces, opened = a_mixed_fleet(random.Random(seed))
    played = play(paces, opened)
    assert played.ended_s <= 2 * shortest(paces, played.called, opened)
    assert not played.overdue
    assert set(played.parts) >= set(played.called), "who is called has work"


def test_a_slow_device_gets_few_probes_and_a_fast_one_many_and_all_end_together() -> None:
    paces = {"fast": 0.1, "fair": 0.2, "slow": 0.5, "slower": 2.5}
    opened = replace(a_round(devices=4, probes=87, pool=1024), over_selection=1.0)
    played = play(paces, opened)
    firsts = {name: parts[0] for name, parts in played.parts.items()}
    assert firsts == {"fast": 22, "fair": 22, "slow": 10, "slower": 2}, "22: an equal share"
    assert played.probes("fast") == 44, "in two parts"
    assert played.ended_s <= 1.3 * shortest(paces, played.called, opened)


@pytest.mark.parametrize("probe_s", [0.1, 0.9, 1.1])
def test_devices_of_equal_speed_share_alike(probe_s: float) -> None:
    reports = [a_report(f"d{number}", probe_s=probe_s) for number in range(3)]
    fleet = Fleet(a_job(), *reports, a_round(devices=2, probes=32))
    assert [width(ranges_of(fleet.works(name))) for name in fleet.call()] == [16] * 3


def test_more_devices_are_called_before_each_has_more_probes() -> None:
    """As long as a further device's pass at theta is worth it."""
    reports = [a_report(f"d{number}", probe_s=0.1) for number in range(30)]
    many = Fleet(a_job(), *reports, a_round(devices=2, probes=128, pool=512))
    called = many.call()
    assert len(called) == 192 // WORTHWHILE_PROBES
    shares = [width(ranges_of(many.works(name))) for name in called]
    assert shares == [WORTHWHILE_PROBES] * 12
    few = Fleet(a_job(), *reports[:5], a_round(devices=2, probes=128, pool=512))
    assert [width(ranges_of(few.works(name))) for name in few.call()] == [39] * 5


def test_a_fast_device_goes_on_while_others_come_and_they_find_work_all_the_same() -> None:
    """Sent away it would sleep, and nobody would call it before half of the deadline."""
    reports = [a_report("d0", probe_s=0.001), a_report("d1", probe_s=1.0)]
    fleet = Fleet(a_job(), *reports, a_report("d2", probe_s=1.0), a_round(devices=2, probes=32))
    assert len(fleet.call()) == 3
    first = fleet.works("d0")
    assert width(ranges_of(first)) == 16, "more could be lost with it than the round can spare"
    fleet.evolve(folded(first))
    second = fleet.works("d0", last=first.key)
    assert width(ranges_of(second)) == 16
    assert [width(ranges_of(fleet.works(name))) for name in ("d1", "d2")] == [1, 1]
    assert width(ranges_of(fleet.works("d0", last=second.key))) == 14


def test_who_finishes_nothing_in_time_is_called_only_if_there_is_nobody_else() -> None:
    slow = [a_report(f"s{number}", probe_s=70.0) for number in range(20)]
    able = [a_report("a0", probe_s=0.1), a_report("a1", probe_s=0.1)]
    alone = Fleet(a_job(), *slow, *able, a_round(devices=2, probes=32))
    assert set(alone.call()) == {"a0", "a1"}
    assert "a probe takes it 70 s" in alone.waits("s0").reason
    lacking = Fleet(a_job(), *slow, *able, a_round(devices=3, probes=32))
    called = lacking.call()
    assert {"a0", "a1"} < set(called)
    assert len(called) == 3
    assert width(ranges_of(lacking.works(called[-1]))) == 1


def test_who_was_too_slow_once_is_tried_again_some_rounds_later() -> None:
    """It may have slept; who is never called cannot show that it is fast."""
    slept = a_report("slept", probe_s=100.0)
    fleet = Fleet(a_job(), slept, a_report("d0", probe_s=0.1), a_report("d1", probe_s=0.1))
    called: list[bool] = []
    for number in range(8):
        fleet.evolve(a_round(number, devices=2, probes=32))
        called.append("slept" in fleet.call())
        fleet.evolve(a_close(number))
    assert called == [False] * 5 + [True] * 3


@pytest.mark.parametrize("seed", range(30))
def test_a_round_outlives_any_one_device(seed: int) -> None:
    rng = random.Random(seed)
    paces = {f"d{number}": 10 ** rng.uniform(-1.5, 0.0) for number in range(rng.randint(8, 24))}
    opened = a_round(devices=4, probes=64, pool=2048)
    gone = rng.choice(play(paces, opened).called)
    played = play(paces, opened, gone=gone)
    assert played.ended_s < opened.deadline_s / 2, "what it held was not needed"


def test_a_device_that_boasts_holds_no_more_than_the_round_can_lose() -> None:
    paces = {f"d{number}": 0.1 for number in range(6)} | {"boaster": 1e-6}
    opened = a_round(devices=7, probes=70, pool=2048)
    played = play(paces, opened, gone="boaster")
    assert played.parts["boaster"] == [35]
    assert played.ended_s == float("inf"), "seven devices are wanted"
    played = play(paces, replace(opened, enough_devices=6), gone="boaster")
    assert played.ended_s < 3.0
    assert max(len(parts) for parts in played.parts.values()) <= 5, "they double: 1, 1, 2, 4, 8"


def test_an_evaluation_that_is_lost_does_not_bring_back_directions_that_were_measured() -> None:
    opened = replace(a_round(devices=1, probes=32), evaluate=True)
    fleet = Fleet(a_job(), a_report("t0", probe_s=0.5), opened)
    fleet.call()
    first = fleet.works("t0")
    fleet.evolve(folded(first), a_report("t0", probe_s=0.5, trusted=True))
    evaluation = fleet.works("t0", last=first.key)
    fleet.ask("t0", last=evaluation.key, declined="no memory")
    second = fleet.works("t0", last=evaluation.key)
    assert not set(directions_of(first)) & set(directions_of(second))
