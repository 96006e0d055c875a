"""A few dozen schedules; that they repeat; and that the verifiers find what they are there for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from shared.logs import configure
from tests.chaos.faults import Fault, Scenario, scenario
from tests.chaos.many import figures
from tests.chaos.mutations import (
    Patch,
    begins_an_epoch_at_zero,
    brings_no_start_after_a_restart,
    claims_nothing,
    counts_what_an_epoch_left_behind,
    folds_twice,
    forgets_its_latecomers_weight,
    forgets_keys,
    loses_a_spool_file,
    never_sends_again,
    removes_before_its_line_is_on_disk,
    removes_the_best,
    removes_what_an_epoch_began_with,
    sends_before_it_is_on_disk,
    settles_before_it_is_logged,
    skips_a_late_term,
    waits_for_ever,
)
from tests.chaos.world import run, shrunk

SEEDS = range(7000, 7040)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    configure("chaos", level="critical")


def test_nothing_is_lost_or_counted_twice_whatever_fails() -> None:
    reports = [run(scenario(seed)) for seed in SEEDS]
    broken = {report.seed: report.violations[:3] for report in reports if report.violations}
    assert not broken, f"repeat: python -m tests.chaos --schedules 1 --seed {min(broken)}"
    told = {figure.name: figure.value for figure in figures(reports, 1.0)}
    assert told["chaos.schedules"] == len(SEEDS)
    assert told["chaos.updates.folded"] > 500
    assert told["chaos.updates.late"] > 0
    assert told["chaos.updates.duplicate"] > 0
    assert sum(name.startswith("chaos.faults.kill") for name in told) > 10


def test_a_seed_repeats_its_schedule_exactly_in_any_process() -> None:
    program = (
        "from shared.logs import configure; configure('chaos', level='critical');"
        "from tests.chaos.faults import scenario; from tests.chaos.world import run;"
        "print([run(scenario(seed)).digest for seed in range(7000, 7006)])"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    ]
    assert told[0] == told[1]
    assert told[0] != ""


@pytest.mark.parametrize(
    ("mutation", "within", "found"),
    [
        (forgets_keys, 40, "is counted twice"),
        (folds_twice, 3, "DETAIL"),
        (skips_a_late_term, 40, "commit of round"),
        (forgets_its_latecomers_weight, 40, "late terms"),
        (loses_a_spool_file, 60, "is lost"),
        (sends_before_it_is_on_disk, 3, "before it was on disk for good"),
        (removes_before_its_line_is_on_disk, 150, "ledger"),
        (settles_before_it_is_logged, 3, "the log does not have it"),
        (waits_for_ever, 40, "s over"),
        (never_sends_again, 60, "not settled"),
        (begins_an_epoch_at_zero, 10, "digest"),
        (brings_no_start_after_a_restart, 40, "s over"),
        (removes_what_an_epoch_began_with, 10, "which is gone"),
        (removes_the_best, 10, "the best snapshot"),
        (counts_what_an_epoch_left_behind, 150, "no device ever had it"),
    ],
)
def test_a_broken_promise_is_found_within_a_few_schedules(
    mutation: Patch, within: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    told = _told_by(map(scenario, range(within)), found)
    assert found in told, told


def test_two_aggregators_that_claim_nothing_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One goes on in LOG and another in DETAIL: what the second counts, no close ever has."""
    claims_nothing(monkeypatch)
    assert "never counted" in _told_by(_failovers(range(200)), "never counted")


def test_a_violation_is_shrunk_to_the_fault_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that keeps nothing over a kill, among faults that harm nobody."""
    loses_a_spool_file(monkeypatch)
    harmless = [Fault(90 + n, "duplicate", "d0", 1.0 + n, for_s=1.0, share=0.1) for n in range(4)]
    for seed in range(60):
        kills = [Fault(n, "kill", "d0", at_step=20 + 9 * n, for_s=0.5) for n in range(4)]
        drops = Fault(80, "drop", "aggregator", 0.0, for_s=60.0, share=0.9)
        given = replace(scenario(seed), faults=[*kills, *harmless, drops])
        if run(given).violations:
            break
    else:
        pytest.fail("the mutation was not found")
    fewest, report = shrunk(given)
    assert report.violations
    assert report.trace
    assert len(fewest.faults) < len(given.faults)
    assert any(fault.kind == "kill" for fault in fewest.faults)


def _told_by(scenarios: Iterator[Scenario], wanted: str) -> str:
    """Violations up to the first schedule that has the wanted one; all, if none has."""
    told = ""
    for given in scenarios:
        told += "\n".join(run(given).violations)
        if wanted in told:
            break
    return told


def _failovers(seeds: range) -> Iterator[Scenario]:
    """Schedules in which a second aggregator is started while the first one hangs."""
    for seed in seeds:
        given = scenario(seed)
        at_s = 2.0 + seed % 12
        hang_s = given.deadline_s
        yield replace(
            given,
            faults=[
                Fault(0, "partition", "aggregator", at_s, for_s=hang_s),
                Fault(1, "second_aggregator", "rival", at_s + hang_s / 2),
            ],
        )
