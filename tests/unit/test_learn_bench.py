"""What the bench of methods makes of its runs: costs, goals, and what it need not run again."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from services.console.methods import METHODS
from tests.bench.learn.curve import Cost, Curve, Ended, Point, tokens_to
from tests.bench.learn.orders import Order, keep, kept, order, so_far
from tests.bench.learn.pacing import Pace
from tests.bench.learn.settings import GRID, ROWS, settings
from tests.bench.learn.table import lines, markdown, ratio


def a_curve(
    row: str, *accuracies: float, tokens: int = 1000, seed: int = 1, ended: Ended = "finished"
) -> Curve:
    """Each point costs `tokens` more; loss is what accuracy lacks."""
    points = tuple(
        Point(number, number * tokens, 1 - value, value, float(number), 10.0, 20.0)
        for number, value in enumerate(accuracies)
    )
    return Curve(row, "ag_news", seed, points, 50.0, ended=ended)


def an_order(**changes: object) -> Order:
    made = Order(
        row="mezo",
        dataset="ag_news",
        seed=1,
        job={"tuning": {"step": 0.1}},
        budget_tokens=1000,
        goal=0.7,
    )
    return msgspec.structs.replace(made, **changes)


def test_a_target_costs_what_was_spent_when_it_was_first_reached() -> None:
    curve = a_curve("mezo", 0.2, 0.5, 0.9, 0.6, 0.9)
    assert tokens_to(curve, 0.2, 1.0, 0.5) == Cost(2000, reached=True)
    assert tokens_to(curve, 0.2, 0.6, 0.75) == Cost(1000, reached=True)
    assert tokens_to(curve, 0.2, 1.0, 0.9) == Cost(4000, reached=False)


def test_a_loss_reaches_its_target_from_above() -> None:
    curve = a_curve("mezo", 0.2, 0.5, 0.9)
    assert tokens_to(curve, 0.8, 0.0, 0.5, "loss") == Cost(2000, reached=True)
    assert tokens_to(curve, 0.8, 0.0, 0.3, "loss") == Cost(1000, reached=True)


def test_a_method_that_misses_the_target_counts_as_ten_times_ours() -> None:
    curves = {
        ("ceiling", 1): a_curve("ceiling", 0.2, 1.0),
        ("seedwire", 1): a_curve("seedwire", 0.2, 0.9, tokens=5000),
        ("mezo", 1): a_curve("mezo", 0.2, 0.4, tokens=7000),
        ("fwdllm", 1): a_curve("fwdllm", 0.2, 0.3, tokens=90_000),
    }
    found = {line.row: line for line in lines(curves, "accuracy")}
    assert found["mezo"].costs[1] == Cost(50_000, reached=False)
    assert found["fwdllm"].costs[1] == Cost(90_000, reached=False)
    assert ratio(list(found.values())) == pytest.approx(0.1)
    assert "| mezo | > 50 k | > 50 k | > 50 k | 40.0 % |" in markdown("ag_news", [found["mezo"]])


def test_one_seed_that_misses_the_target_makes_the_row_miss_it() -> None:
    curves = {
        ("ceiling", 1): a_curve("ceiling", 0.2, 1.0),
        ("ceiling", 2): a_curve("ceiling", 0.2, 1.0, seed=2),
        ("seedwire", 1): a_curve("seedwire", 0.2, 0.9),
        ("seedwire", 2): a_curve("seedwire", 0.2, 0.7, 0.7, seed=2),
    }
    ours = next(line for line in lines(curves, "accuracy") if line.row == "seedwire")
    assert [cost.reached for cost in ours.costs] == [True, False, False]
    assert ours.costs[1].tokens == 1500


def test_a_finished_run_is_kept_as_it_was(tmp_path: Path) -> None:
    asked, curve = an_order(), a_curve("mezo", 0.2, 0.5)
    assert kept(asked, tmp_path) is None
    so_far(asked, curve.points, tmp_path)
    assert kept(asked, tmp_path) is None
    keep(asked, curve, tmp_path)
    assert kept(asked, tmp_path) == curve
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"row": "fwdllm"},
        {"split": "iid"},
        {"quantisation": "q4_k_m"},
        {"job": {"tuning": {"step": 0.2}}},
        {"torch": {"rounds": 3}},
    ],
)
def test_a_run_with_another_setting_is_another_run(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    keep(an_order(), a_curve("mezo", 0.2), tmp_path)
    assert kept(an_order(**changes), tmp_path) is None


def test_a_default_of_the_console_is_part_of_what_a_run_is_known_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = order("mezo", "ag_news", 1, budget_tokens=10)
    assert before.job["adapter"]["distribution"] == "gauss8"
    monkeypatch.setitem(METHODS["mezo"].tables["tuning"], "eps", 0.5)
    after = order("mezo", "ag_news", 1, budget_tokens=10)
    assert after.job["tuning"]["eps"] == 0.5
    assert after.name != before.name
    assert after.name == order("mezo", "ag_news", 1, budget_tokens=20, goal=0.5).name


def test_a_kept_run_serves_unless_it_stopped_before_what_is_wanted_now(tmp_path: Path) -> None:
    cases: list[tuple[Ended, dict[str, object], bool]] = [
        ("finished", {"budget_tokens": 2000, "goal": 0.9}, True),
        ("diverged", {"budget_tokens": 2000}, True),
        ("budget", {"budget_tokens": 900}, True),
        ("budget", {"budget_tokens": 1100}, False),
        ("goal", {"budget_tokens": 2000, "goal": 0.6}, True),
        ("goal", {"goal": 0.8}, False),
        ("goal", {"goal": None}, False),
    ]
    for ended, more, serves in cases:
        keep(an_order(), a_curve("mezo", 0.2, ended=ended), tmp_path)
        assert (kept(an_order(**more), tmp_path) is not None) == serves, (ended, more)


def test_a_run_ends_when_it_has_its_goal_and_gains_no_more() -> None:
    pace = Pace(budget_tokens=100_000, commits_between=10, goal=0.8)
    rising = a_curve("mezo", 0.2, 0.7, 0.85).points
    assert pace.verdict(rising, 2000) is None
    assert pace.verdict(rising, 2900) is None
    assert pace.verdict(rising, 3100) == "goal"
    assert pace.verdict(rising[:2], 3100) is None
    assert pace.verdict(rising[:2], 100_000) == "budget"


def test_a_run_whose_loss_has_grown_beyond_hope_has_diverged() -> None:
    pace = Pace(budget_tokens=100_000, commits_between=10)
    start = a_curve("mezo", 0.2).points[0]
    assert pace.verdict([start, replace(start, loss=2 * start.loss)], 10) is None
    assert pace.verdict([start, replace(start, loss=4 * start.loss)], 10) == "diverged"
    assert pace.verdict([start, replace(start, loss=float("nan"))], 10) == "diverged"


def test_the_judge_looks_by_tokens_and_at_least_every_so_many_commits() -> None:
    pace = Pace(budget_tokens=4000, commits_between=5)
    spent = [(commit, 10 * commit) for commit in range(1, 41)]
    assert [commit for commit, tokens in spent if pace.due(commit, tokens)] == [
        *range(5, 41, 5),
    ]
    pace = Pace(budget_tokens=4000, commits_between=1000)
    spent = [(commit, 50 * commit) for commit in range(1, 81)]
    looked = [commit for commit, tokens in spent if pace.due(commit, tokens)]
    assert looked[:4] == [3, 6, 9, 12]
    assert looked[-1] == 80
    assert len(looked) <= 30


def test_every_row_is_tuned_by_four_trials_that_change_what_it_has() -> None:
    assert GRID.keys() == set(ROWS)
    for row, trials in GRID.items():
        assert len(trials) == 4
        assert len({str(settings(row, "ag_news").with_(trial)) for trial in trials}) == 4
