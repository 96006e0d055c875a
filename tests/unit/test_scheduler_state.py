"""The scheduler's decisions: facts and requests in, answers and calls out."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from services.scheduler.dealing import deal
from services.scheduler.devices import Device
from services.scheduler.offers import Selection
from services.scheduler.state import Fact, State
from shared.messages import (
    STOPPED,
    ComeBack,
    Contribution,
    DeviceReport,
    EvaluateWork,
    Evaluation,
    FoldedUpdate,
    JobEnded,
    JobOpened,
    JobSpec,
    ProbeWork,
    Range,
    RequestWork,
    RoundClosed,
    RoundOpened,
    RoundReport,
    Speed,
    Task,
    UpdateKey,
    UpdatesFolded,
    Walk,
    WalkWork,
    WorkAssigned,
)
from shared.ranges import width
from tests.support.facts import DIGEST, device_report, round_closed, round_opened


def a_job(name: str = "demo", *, allow: list[str] | None = None) -> JobOpened:
    spec = JobSpec(
        task=Task(loss="tokens"),
        evaluation=Evaluation(every_rounds=1, enough_devices=1),
        allow_devices=allow or [],
    )
    return JobOpened(job=name, spec=spec)


def a_round(number: int = 1, *, devices: int = 2, probes: int = 32, pool: int = 64) -> RoundOpened:
    return round_opened(
        number,
        directions=pool,
        batch_rows=8,
        enough_devices=devices,
        enough_probes=probes,
        over_selection=1.5,
        deadline_s=60.0,
    )


def a_close(number: int = 1) -> RoundClosed:
    return round_closed(number, detail_sequence=0)


def a_report(device: str, *, probe_s: float = 0.0, trusted: bool = False) -> DeviceReport:
    return device_report(
        device,
        heldout_rows=5 if trusted else 0,
        trusted=trusted,
        speeds=[Speed("demo", probe_s=probe_s)] if probe_s else [],
    )


class Fleet:
    """A State with devices that ask it, and a record of what they were told."""

    def __init__(self, *facts: Fact) -> None:
        self.state = State(idle_comeback_s=900.0, seed=1)
        self.now = 0.0
        self.evolve(*facts)

    def evolve(self, *facts: Fact) -> None:
        for fact in facts:
            self.state.evolve(fact, self.now)

    def call(self) -> list[str]:
        """Carry out the calls that are due; who is woken."""
        woken: list[str] = []
        for selection in self.state.plan(self.now):
            self.evolve(selection)
            woken += self.state.called(selection, self.now)
        return woken

    def ask(
        self,
        device: str,
        *,
        last: UpdateKey | None = None,
        declined: str = "",
        kinds: tuple[str, ...] = ("probe", "walk", "evaluate"),
    ) -> WorkAssigned | ComeBack:
        request = RequestWork(device=device, kinds=list(kinds), last=last, declined=declined)
        self.evolve(request)
        answer = self.state.decide(request, self.now)
        if isinstance(answer.message, WorkAssigned):
            assert answer.decision is not None
            assert answer.decision.reason
            self.evolve(answer.message)
        return answer.message

    def works(self, device: str, *, last: UpdateKey | None = None) -> WorkAssigned:
        answer = self.ask(device, last=last)
        assert isinstance(answer, WorkAssigned), answer
        return answer

    def waits(self, device: str, *, last: UpdateKey | None = None) -> ComeBack:
        answer = self.ask(device, last=last)
        assert isinstance(answer, ComeBack), answer
        return answer


def a_fleet(size: int = 8, *, opened: RoundOpened | None = None, probe_s: float = 0.5) -> Fleet:
    """`size` devices d0, d1, ... that have reported, and an open round that has called some."""
    reports = [a_report(f"d{number}", probe_s=probe_s) for number in range(size)]
    fleet = Fleet(a_job(), *reports, opened or a_round())
    fleet.call()
    return fleet


def ranges_of(assigned: WorkAssigned) -> list[Range]:
    assert isinstance(assigned.work, ProbeWork)
    return assigned.work.ranges


def directions_of(assigned: WorkAssigned) -> list[int]:
    return [first + i for first, count in ranges_of(assigned) for i in range(count)]


def folded(assigned: WorkAssigned, *, work_s: float = 1.0) -> UpdatesFolded:
    key = assigned.key
    probes = len(directions_of(assigned)) if isinstance(assigned.work, ProbeWork) else 0
    kind = "probe" if isinstance(assigned.work, ProbeWork) else "evaluate"
    row = FoldedUpdate(key.device, key.round, key.part, "folded", probes, 1, 1.0, work_s, kind)
    return UpdatesFolded(job=key.job, epoch=key.epoch, round=key.round, updates=[row])


def a_round_report(number: int, *devices: str) -> RoundReport:
    rows = [Contribution(device, 1, 8, 10, 1.0, 1.0, 0) for device in devices]
    return RoundReport(job="demo", epoch=0, round=number, contributions=rows)


def test_an_unknown_device_is_asked_for_a_report_and_then_wanted() -> None:
    fleet = Fleet(a_job(), a_round())
    fleet.call()
    assert fleet.waits("d0").report
    assert fleet.state.wanted_by("d0", fleet.now) == ""
    fleet.evolve(a_report("d0"))
    assert fleet.state.wanted_by("d0", fleet.now) == "demo"
    assert fleet.works("d0").key == UpdateKey("demo", 0, 1, "d0", 0)


def test_a_device_that_said_goodbye_and_came_back_is_asked_for_a_report() -> None:
    fleet = a_fleet(1)
    fleet.evolve(replace(a_report("d0"), problem=STOPPED))
    assert fleet.waits("d0").report
    fleet.evolve(a_report("d0"))
    fleet.works("d0")


def test_who_cannot_help_with_one_job_helps_with_the_next() -> None:
    unable = replace(a_report("d0"), unable={"mistaken": "no usable row"})
    fleet = Fleet(a_job("mistaken"), a_job(), unable, a_round())
    assert fleet.call() == ["d0"]
    fleet.works("d0")
    assert fleet.state.listed(0.0).devices[0].problem == "job mistaken: no usable row"


def test_what_a_device_could_not_do_for_a_job_is_no_problem_once_the_job_has_ended() -> None:
    both = {"over": "no usable row", "demo": "no memory"}
    fleet = Fleet(a_job("over"), a_job(), replace(a_report("d0"), unable=both))
    assert "job over: " in fleet.state.listed(0.0).devices[0].problem
    fleet.evolve(JobEnded(job="over", epoch=0, round=1, reason="stopped", digest="d" * 64))
    assert fleet.state.listed(0.0).devices[0].problem == "job demo: no memory"


@pytest.mark.parametrize(("told", "listed"), [(157, 157), (-1, 0), (2**63, 2**53)])
def test_refused_rows_are_listed_whatever_a_device_says(told: int, listed: int) -> None:
    fleet = Fleet(replace(a_report("d0"), counters={"rows_refused": told}))
    (device,) = fleet.state.listed(0.0).devices
    assert device.rows_refused == listed


def test_an_absurd_speed_costs_no_call() -> None:
    fleet = Fleet(a_job(), a_report("d0", probe_s=5e-324), a_report("d1"), a_round())
    assert set(fleet.call()) == {"d0", "d1"}


def test_a_round_calls_as_many_as_it_needs_times_over_selection() -> None:
    fleet = Fleet(a_job(), *[a_report(f"d{i}", probe_s=0.5) for i in range(8)], a_round())
    assert len(fleet.call()) == 3, "ceil(1.5 * 2 devices); 60 s hold enough probes of 0.5 s"
    assert fleet.call() == []
    slow = Fleet(a_job(), *[a_report(f"d{i}", probe_s=9.0) for i in range(30)], a_round())
    assert len(slow.call()) == 12, "4 probes of 9 s fit 36 s, so 8 devices give 32"


def test_those_not_called_come_back_and_the_called_share_what_is_needed() -> None:
    fleet = a_fleet()
    called = list(fleet.state.jobs["demo"].open.chosen)  # pyright: ignore[reportOptionalMemberAccess]
    other = next(f"d{i}" for i in range(8) if f"d{i}" not in called)
    told = fleet.waits(other)
    assert "enough devices" in told.reason
    assert 90 <= told.after_s <= 150, "twice the deadline, spread"
    assigned = [fleet.works(device) for device in called]
    assert [ranges_of(each) for each in assigned] == [[(0, 16)], [(16, 16)], [(32, 16)]]
    assert {(each.digest, each.deadline_s) for each in assigned} == {(DIGEST, 60.0)}


def test_places_of_called_devices_that_do_not_come_go_to_others() -> None:
    fleet = a_fleet()
    fleet.now = 7.0
    taken = [fleet.ask(f"d{i}") for i in range(8)]
    assert sum(isinstance(answer, WorkAssigned) for answer in taken) >= 3


def test_who_does_not_answer_is_replaced_at_once_and_not_called_again_before_it_is_heard() -> None:
    fleet = Fleet(a_job(), *(a_report(f"d{number}", probe_s=0.5) for number in range(6)))
    fleet.evolve(a_round())
    called = set(fleet.call())
    assert len(called) == 3
    fleet.works(min(called))
    gone = called - {min(called)}
    fleet.now = 4.0
    replacements = set(fleet.call())
    assert len(replacements) == len(gone)
    assert not replacements & called
    for name in replacements:
        fleet.works(name)
    fleet.evolve(a_close(), a_round(2, devices=6))
    assert not gone & set(fleet.call())
    fleet.evolve(*(a_report(name) for name in gone), a_close(2), a_round(3, devices=6))
    assert gone <= set(fleet.call())


def test_work_fits_a_safe_share_of_what_is_left() -> None:
    fleet = a_fleet(opened=a_round(devices=1, probes=64), size=2, probe_s=1.0)
    fleet.now = 20.0
    assert width(ranges_of(fleet.works("d0"))) == 24
    assert width(ranges_of(a_fleet(probe_s=0.0, size=2).works("d0"))) == 8, "a trial first"


def test_a_speed_seen_in_the_round_sizes_the_next_part() -> None:
    fleet = a_fleet(size=1, probe_s=0.0, opened=a_round(devices=1, probes=40))
    first = fleet.works("d0")
    fleet.now = 10.0
    fleet.evolve(folded(first, work_s=16.0))
    second = fleet.works("d0", last=first.key)
    assert second.key.part == 1
    assert ranges_of(second) == [(8, 15)], "0.6 * 50 s / 2 s"


def test_a_device_that_is_done_gets_more_only_while_the_round_lacks_probes() -> None:
    fleet = a_fleet(size=2, probe_s=0.1, opened=a_round(devices=2, probes=8))
    one, two = fleet.works("d0"), fleet.works("d1")
    assert [width(ranges_of(each)) for each in (one, two)] == [4, 4]
    more = fleet.works("d0", last=one.key)
    assert (more.key.part, ranges_of(more)) == (1, [(8, 4)])
    assert "as many probes as it needs" in fleet.waits("d1", last=two.key).reason


def test_a_lost_part_is_dealt_again_under_a_new_number() -> None:
    fleet = a_fleet(size=2, probe_s=0.1, opened=a_round(devices=2, probes=8))
    fleet.works("d0")
    again = fleet.works("d0", last=None)
    assert again.key.part == 1
    fleet.works("d1")
    assert fleet.works("d0", last=again.key).key.part == 2, "4 of 12 probes are lost"


def test_who_was_killed_in_the_middle_of_its_work_is_given_it_again() -> None:
    """Else a round that wants everybody would wait for its deadline."""
    exact = replace(a_round(devices=2), how="exact", evaluate=True)
    fleet = Fleet(a_job(), a_report("d0"), a_report("d1", trusted=True), exact)
    fleet.call()
    first = fleet.works("d0")
    again = fleet.works("d0", last=None)
    assert (again.key.part, ranges_of(again)) == (1, ranges_of(first))
    fleet.evolve(folded(again))
    fleet.waits("d0", last=again.key)
    evaluating = fleet.works("d1")
    assert isinstance(evaluating.work, EvaluateWork)
    assert isinstance(fleet.works("d1", last=None).work, EvaluateWork)


def test_no_direction_is_measured_twice_by_one_device() -> None:
    fleet = a_fleet(size=1, probe_s=0.1, opened=a_round(devices=1, probes=100, pool=24))
    first = fleet.works("d0")
    assert sorted(directions_of(first)) == list(range(24))
    assert "every direction" in fleet.waits("d0", last=first.key).reason


@given(st.integers(1, 40), st.integers(0, 39), st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_dealing_goes_round_the_pool_and_never_repeats_for_a_device(
    pool: int, position: int, counts: list[int]
) -> None:
    position %= pool
    own: list[Range] = []
    for count in counts:
        dealt = deal(position, count, pool, own)
        assert width(dealt) == min(count, pool - width(own))
        own += dealt
    every = [first + i for first, count in own for i in range(count)]
    assert len(set(every)) == len(every)
    assert every == [(position + i) % pool for i in range(len(every))]


def test_part_numbers_go_on_after_a_restart_by_the_device_and_by_the_log() -> None:
    fleet = Fleet(a_job(), a_round(), a_report("d0"), a_report("d1"))
    assert fleet.works("d0", last=UpdateKey("demo", 0, 1, "d0", 4)).key.part == 5
    row = FoldedUpdate("d1", 1, 2, "folded", 8)
    fleet.evolve(UpdatesFolded(job="demo", epoch=0, round=1, updates=[row]))
    assert fleet.works("d1").key.part == 3
    assert fleet.works("d1", last=UpdateKey("demo", 0, 0, "d1", 9)).key.part == 4


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (replace(a_report("d0"), problem="no model: set `model`"), "no model: set `model`"),
        (replace(a_report("d0"), rows=0), "no rows"),
        (a_report("stranger"), "does not allow"),
    ],
)
def test_a_device_that_cannot_help_is_not_called_and_told_why(
    report: DeviceReport, reason: str
) -> None:
    fleet = Fleet(a_job(allow=["d0"]), report, a_round())
    assert fleet.call() == []
    assert reason in fleet.waits(report.device).reason


def test_declined_work_is_not_given_to_that_device_again_and_its_place_is_free() -> None:
    fleet = a_fleet(size=2, opened=a_round(devices=1, probes=8))
    first = fleet.works("d0")
    answer = fleet.ask("d0", last=first.key, declined="the engine refused")
    assert isinstance(answer, ComeBack)
    assert "could not do" in answer.reason
    fleet.evolve(a_close(), a_round(2))
    fleet.call()
    assert fleet.works("d0").key.round == 2


def test_trusted_devices_evaluate_once_and_then_probe() -> None:
    opened = replace(a_round(devices=3), evaluate=True)
    reports = [a_report("d0"), a_report("t0", trusted=True), a_report("t1", trusted=True)]
    fast = replace(a_report("t2", trusted=True), speeds=[Speed("demo", evaluate_s=1.0)])
    fleet = Fleet(a_job(), *reports, fast, opened)
    assert fleet.call()[:2] == ["t2", "t0"], "ceil(1.5 * 1), the fastest first"
    evaluation = fleet.works("t2")
    assert isinstance(evaluation.work, EvaluateWork)
    probes = fleet.works("t2", last=evaluation.key)
    assert (probes.key.part, isinstance(probes.work, ProbeWork)) == (1, True)
    assert isinstance(fleet.works("d0").work, ProbeWork)


def test_an_evaluation_round_wants_trusted_devices_alone() -> None:
    opened = replace(a_round(), kind="evaluate", directions=0, enough_probes=0, evaluate=True)
    fleet = Fleet(a_job(), a_report("d0"), a_report("t0", trusted=True), opened)
    assert fleet.call() == ["t0"]
    assert "evaluation alone" in fleet.waits("d0").reason
    assert isinstance(fleet.works("t0").work, EvaluateWork)


def test_an_exact_round_gives_every_device_all_directions_once() -> None:
    fleet = a_fleet(opened=replace(a_round(devices=2, probes=128), how="exact"), probe_s=0.0)
    called = fleet.state.jobs["demo"].open
    assert called is not None
    assert len(called.chosen) == 3
    first = fleet.works(next(iter(called.chosen)))
    assert ranges_of(first) == [(0, 64)]
    assert "every direction" in fleet.waits(first.key.device, last=first.key).reason


def test_at_half_of_the_deadline_further_devices_are_called_and_find_room() -> None:
    fleet = a_fleet()
    called = list(fleet.state.jobs["demo"].open.chosen)  # pyright: ignore[reportOptionalMemberAccess]
    for device in called:
        fleet.works(device)
    fleet.now = 29.0
    assert fleet.call() == []
    fleet.now = 30.0
    second = fleet.call()
    assert len(second) == 3
    assert not set(second) & set(called), "those still at work are left alone"
    assert all(isinstance(fleet.ask(device), WorkAssigned) for device in second)
    fleet.now = 50.0
    assert fleet.call() == []


def test_who_was_called_and_gave_nothing_earns_nothing_but_not_who_was_turned_away() -> None:
    fleet = a_fleet(size=3)
    fleet.works("d0")
    fleet.evolve(replace(a_report("d2"), problem="busy"))
    fleet.waits("d2")
    fleet.evolve(a_close(), a_round(2), a_round_report(1, "d0"))
    bandit = fleet.state.jobs["demo"].bandit
    assert [(bandit.arm(f"d{i}").plays, bandit.arm(f"d{i}").mean) for i in range(3)] == [
        (1, 1.0),
        (1, 0.0),
        (0, 0.0),
    ]


def test_a_vanished_device_is_called_less_and_less() -> None:
    fleet = a_fleet(size=6, opened=a_round(0, devices=1, probes=8))
    calls = dict.fromkeys((f"d{i}" for i in range(6)), 0)
    for number in range(120):
        opened = fleet.state.jobs["demo"].open
        assert opened is not None
        for name in opened.chosen:
            calls[name] += 1
        there = [name for name in opened.chosen if name != "d3"]
        fleet.evolve(a_close(number), a_round_report(number, *there))
        fleet.evolve(a_round(number + 1, devices=1, probes=8))
        fleet.call()
    assert 0 < calls["d3"] < 0.6 * min(count for name, count in calls.items() if name != "d3")


def test_after_a_restart_recent_contributors_are_called_before_they_report() -> None:
    facts = [a_job(), a_round(1), a_close(1), a_round(2), a_round_report(1, "d0", "d1")]
    fleet = Fleet(*facts)
    assert sorted(fleet.call()) == ["d0", "d1"]
    assert fleet.waits("d0").report
    fleet.evolve(a_report("d0"))
    assert fleet.works("d0").key.round == 2


def test_without_a_job_devices_come_back_late_and_spread() -> None:
    fleet = a_fleet(size=40)
    fleet.evolve(JobEnded(job="demo", epoch=0, round=1, reason="finished", digest=DIGEST))
    waits = [fleet.waits(f"d{i}") for i in range(40)]
    assert {told.reason for told in waits} == {"no job is running"}
    assert len({told.after_s for told in waits}) == 40
    assert all(675 <= told.after_s <= 1125 for told in waits)


def test_an_answer_looks_at_no_other_device() -> None:
    class Closed(dict[str, Device]):
        def _refuse(self) -> None:
            raise AssertionError("an answer went through all devices")

        __iter__ = values = keys = items = _refuse  # pyright: ignore

    fleet = a_fleet()
    fleet.state.devices = Closed(fleet.state.devices)
    for i in range(8):
        fleet.ask(f"d{i}")
        fleet.state.wanted_by(f"d{i}", fleet.now)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_no_key_is_issued_twice_and_no_work_is_out_of_bounds(seed: int) -> None:
    rng, pool = random.Random(seed), 48
    fleet = Fleet(a_job())
    keys: set[UpdateKey] = set()
    measured: dict[tuple[int, str], list[int]] = {}
    last: dict[str, WorkAssigned] = {}
    log: list[Fact] = [a_job()]

    def fact(event: Fact) -> None:
        log.append(event)
        fleet.evolve(event)

    def ask(device: str) -> None:
        before = last.get(device)
        declined = "no" if rng.random() < 0.1 else ""
        answer = fleet.ask(device, last=before.key if before else None, declined=declined)
        if isinstance(answer, ComeBack):
            return
        last[device] = answer
        assert answer.key not in keys
        keys.add(answer.key)
        if isinstance(answer.work, ProbeWork):
            directions = directions_of(answer)
            assert directions
            assert all(0 <= one < pool for one in directions)
            before_it = measured.setdefault((answer.key.round, device), [])
            before_it += directions
            assert len(set(before_it)) == len(before_it)
            if rng.random() < 0.5:
                fact(folded(answer))

    def restart(_: str) -> None:
        nonlocal fleet, measured
        now, fleet = fleet.now, Fleet(*log)
        fleet.now, measured = now, {}

    def next_round(_: str) -> None:
        nonlocal number
        fact(a_close(number))
        number += 1
        kind = rng.choice(["tune", "tune", "evaluate"])
        directions = pool if kind == "tune" else 0
        opened = a_round(number, pool=directions, probes=rng.randint(1, 90))
        fact(replace(opened, kind=kind, evaluate=rng.random() < 0.5))
        fact(a_round_report(number - 1, *rng.sample([f"d{i}" for i in range(9)], 3)))

    def report(device: str) -> None:
        probe_s = rng.choice([0.0, 0.01, 1.0, 50.0])
        fleet.evolve(a_report(device, probe_s=probe_s, trusted=rng.random() < 0.3))

    number = 0
    steps: list[Callable[[str], None]] = [ask, ask, ask, ask, report]
    for _ in range(600):
        fleet.now += rng.random()
        step = rng.choice([*steps, *steps, *steps, next_round])
        step = restart if rng.random() < 0.01 else step
        step(f"d{rng.randrange(9)}")
        fleet.call()


def test_replaying_the_log_gives_the_same_arms() -> None:
    facts: list[Fact] = [a_job()]
    for number in range(1, 20):
        facts += [a_round(number), a_close(number), a_round_report(number, "a", f"d{number % 3}")]
    one, two = Fleet(*facts), Fleet(*facts)
    selections: list[list[Selection]] = [fleet.state.plan(0.0) for fleet in (one, two)]
    arms = [[fleet.state.jobs["demo"].bandit.arm(n) for n in ("a", "d0")] for fleet in (one, two)]
    assert arms[0] == arms[1]
    assert selections[0] == selections[1]


def test_a_request_that_comes_twice_is_answered_with_two_keys_and_one_is_not_waited_for() -> None:
    fleet = a_fleet(size=2, probe_s=0.1, opened=a_round(devices=2, probes=8))
    first, second = fleet.works("d0"), fleet.works("d0")  # the link doubled what it carried
    assert first.key != second.key
    fleet.works("d1")
    more = fleet.works("d0", last=first.key)  # it does the first, and asks again
    assert more.key.part == 2, "what the second held is dealt again, under a new number"


def test_the_last_report_to_arrive_counts_and_the_next_one_sets_an_old_one_right() -> None:
    fleet = a_fleet(1)
    fleet.evolve(a_report("d0"), a_report("d0"))
    assert isinstance(fleet.ask("d0"), WorkAssigned)
    fleet.evolve(replace(a_report("d0"), rows=0, heldout_rows=0))  # it was overtaken by newer ones
    assert "no rows" in fleet.waits("d0").reason
    fleet.evolve(a_report("d0"))
    assert isinstance(fleet.ask("d0"), WorkAssigned)


def a_walking_round(number: int = 1, *, devices: int = 2) -> RoundOpened:
    walk = Walk(steps=10, step=0.1)
    return replace(a_round(number, devices=devices, probes=10 * devices), walk=walk)


def test_who_does_not_know_walks_waits_and_is_not_called_for_them_again() -> None:
    fleet = a_fleet(6, opened=a_walking_round(devices=3))
    old = ("probe", "evaluate")
    refused = fleet.ask("d0", kinds=old)
    assert isinstance(refused, ComeBack)
    assert "no work of a kind that the device knows" in refused.reason
    fleet.now = 4.0  # its place is held for a moment
    walks = [fleet.works(f"d{number}") for number in (1, 2, 3)]
    for assigned in walks:
        assert assigned.work == WalkWork(64, Walk(steps=10, step=0.1))
        again = fleet.ask(assigned.key.device, last=assigned.key)
        assert isinstance(again, ComeBack)
        assert "it has walked round 1" in again.reason
    devices = [assigned.key.device for assigned in walks]
    fleet.evolve(a_close(), a_round_report(1, *devices), a_walking_round(2, devices=6))
    assert "d0" not in fleet.call()
    fleet.evolve(a_close(2), a_round_report(2, *devices), a_round(3, devices=6))
    assert "d0" in fleet.call()


def test_a_walk_that_was_lost_is_walked_anew_under_a_new_number() -> None:
    fleet = a_fleet(2, opened=a_walking_round())
    first = fleet.works("d0")
    again = fleet.works("d0", last=None)
    assert (again.key.part, again.work) == (first.key.part + 1, first.work)


def test_a_device_that_cannot_walk_declines_once_and_its_place_is_free() -> None:
    fleet = a_fleet(3, opened=a_walking_round(devices=1))
    assigned = fleet.works("d0")
    refused = fleet.ask("d0", last=assigned.key, declined="no step had a finite loss")
    assert isinstance(refused, ComeBack)
    assert "it could not do the work of round 1" in refused.reason
    fleet.works("d1")


@given(data=st.data())
def test_only_survivors_are_dealt_and_all_of_them(data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, 63), min_size=1, max_size=20))
    survivors = [(index, 1) for index in sorted(chosen)]
    opened = replace(a_round(devices=3, probes=64), survivors=survivors)
    fleet = a_fleet(3, opened=opened)
    for name in ("d0", "d1", "d2"):
        dealt, last = list[int](), None
        while isinstance(answer := fleet.ask(name, last=last), WorkAssigned):
            dealt += directions_of(answer)
            last = answer.key
        assert len(dealt) == len(set(dealt))
        assert set(dealt) <= chosen
        if name == "d0":
            assert set(dealt) == chosen
