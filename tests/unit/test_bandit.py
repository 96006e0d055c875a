"""The scheduler's bandit and rewards, against the theorem, the paper's sums and common sense."""

import random
from math import inf, log, pi, sqrt

import pytest

from services.scheduler.bandit import Bandit
from services.scheduler.rewards import Rewards, signal_per_s
from shared.messages import Contribution


def a_contribution(
    device: str, *, slope: float = 1.0, work_s: float = 1.0, late: int = 0
) -> Contribution:
    return Contribution(device, 1, 8, 100, slope, work_s, late)


def test_plays_of_a_worse_arm_stay_below_the_bound_of_ucb1() -> None:
    bandit, means, rng = (
        Bandit(discount=1.0, exploration=0.5),
        {"a": 0.9, "b": 0.6},
        random.Random(5),
    )
    for _ in range(2000):
        bandit.advance()
        name = next(bandit.ranked(means))[0]
        bandit.play(name, float(rng.random() < means[name]))
    gap = means["a"] - means["b"]
    assert bandit.arm("b").plays <= 8 * log(2000) / gap**2 + 1 + pi**2 / 3


def test_the_lazy_index_is_the_sum_of_the_paper() -> None:
    gamma, xi, rng = 0.9, 0.6, random.Random(3)
    bandit, history = Bandit(discount=gamma, exploration=xi), list[tuple[int, str, float]]()
    for step in range(1, 60):
        bandit.advance()
        for name in rng.sample("abcdef", 2):
            reward = rng.random()
            bandit.play(name, reward)
            history.append((step, name, reward))
    total = sum(gamma ** (59 - step) for step, _, _ in history)
    for arm in "abcdef":
        plays = [(gamma ** (59 - step), reward) for step, name, reward in history if name == arm]
        weight = sum(discount for discount, _ in plays)
        mean = sum(discount * reward for discount, reward in plays) / weight
        expected = mean + 2 * sqrt(xi * log(total) / weight)
        assert bandit.index(arm) == pytest.approx(expected)


def test_devices_never_played_come_first_by_tie_and_then_by_name() -> None:
    bandit = Bandit()
    bandit.play("a", 1.0)
    assert list(bandit.ranked("cab"))[:2] == [("b", inf), ("c", inf)]
    assert [name for name, _ in bandit.ranked("cab", tie=lambda name: -ord(name))] == [
        "c",
        "b",
        "a",
    ]


def test_a_fast_device_is_chosen_more_often_and_a_slow_one_is_still_explored() -> None:
    bandit, rewards = Bandit(), Rewards()
    work_s = {"fast": 1.0, "middle": 2.0, "slow": 8.0}
    chosen = dict.fromkeys(work_s, 0)
    for _ in range(300):
        names = [name for name, _ in list(bandit.ranked(work_s))[:1]]
        earned = rewards.of([a_contribution(name, work_s=work_s[name]) for name in names])
        bandit.advance()
        for name in names:
            bandit.play(name, earned[name])
            chosen[name] += 1
    assert chosen["fast"] > chosen["middle"] > chosen["slow"] > 20


def test_a_device_that_vanishes_sinks_and_one_that_gets_better_rises() -> None:
    bandit = Bandit()
    worth = {"steady": 0.5, "vanishing": 1.0, "rising": 0.1}
    late_choices: list[str] = []
    for step in range(400):
        if step == 150:
            worth = {"steady": 0.5, "vanishing": 0.0, "rising": 1.0}
        name = next(bandit.ranked(worth))[0]
        bandit.advance()
        bandit.play(name, worth[name])
        if step >= 250:
            late_choices.append(name)
    assert late_choices.count("rising") > late_choices.count("steady")
    assert late_choices.count("steady") > late_choices.count("vanishing")


def test_a_reward_is_signal_per_second_within_the_largest_of_the_window() -> None:
    rewards = Rewards()
    first = rewards.of([a_contribution("a"), a_contribution("b", work_s=4.0)])
    assert first == {"a": 1.0, "b": 0.25}
    assert rewards.of([a_contribution("c", slope=0.5)]) == {"c": 0.5}
    last = [rewards.of([a_contribution("c", slope=0.5)]) for _ in range(40)]
    assert last[-1] == {"c": 1.0}, "the large slopes of early rounds are forgotten"


def test_a_late_part_is_worth_half() -> None:
    assert signal_per_s(a_contribution("a", late=1)) == 0.5 * signal_per_s(a_contribution("a"))
