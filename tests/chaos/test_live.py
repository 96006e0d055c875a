"""A few schedules over real processes; and that their verdict finds what it is there for."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.logs import configure
from tests.chaos.live.boundaries import NAMES
from tests.chaos.live.plan import Blow, Plan, a_plan
from tests.chaos.live.schedule import run

QUIET = replace(
    a_plan(0),
    devices=("d0", "d1", "d2"),
    how="exact",
    rounds=12,
    deadline_s=2.0,
    enough_devices=2,
    lateness_rounds=4,
    batch=256,
    delay_s=0.01,
    kills={},
    blows=(),
)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    configure("chaos", level="critical")


def test_thirty_plans_end_a_process_at_every_boundary_that_there_is() -> None:
    drawn = {program: set[str]() for program in NAMES}
    for seed in range(30):
        for who, kills in a_plan(seed).kills.items():
            program = who if who in NAMES else "edge"
            drawn[program] |= {at.rpartition(":")[0] for at in kills}
    for program, names in NAMES.items():
        assert drawn[program] >= set(names), program


@pytest.mark.parametrize("seed", [41, 42])
async def test_real_processes_lose_nothing_and_count_nothing_twice(
    seed: int, tmp_path: Path
) -> None:
    report = await run(a_plan(seed), tmp_path)
    assert not report.violations, f"repeat: python -m tests.chaos.live --seed {seed} --schedules 1"
    assert sum(n for kind, n in report.injected.items() if kind.startswith("kill ")) > 0
    assert report.updates["folded"] > 10


@pytest.mark.parametrize(
    ("plan", "found"),
    [
        (replace(QUIET, mutation={"aggregator": "folds_twice"}), "DETAIL"),
        (
            replace(
                QUIET,
                mutation={"aggregator": "forgets_keys"},
                kills={"aggregator": ("acknowledge:2", "acknowledge:1")},
            ),
            "is counted twice",
        ),
        (
            replace(
                QUIET,
                how="probe",  # an exact round takes no pass but the first: all end before a blow
                rounds=4,
                delay_s=0.02,
                mutation=dict.fromkeys(QUIET.devices, "never_sends_again"),
                blows=(
                    Blow("freeze", "aggregator", 0.5, 2.5),
                    Blow("kill", "broker", 2.5, 0.2),
                ),
            ),
            "never settled",
        ),
    ],
)
async def test_a_broken_promise_of_a_real_process_is_found(
    plan: Plan, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.chaos.live.schedule.SETTLED_S", 8.0)
    report = await run(plan, tmp_path)
    assert any(found in violation for violation in report.violations), report.violations
