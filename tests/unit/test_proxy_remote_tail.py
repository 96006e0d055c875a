"""Tail fill against the exact ensemble, and what a bias can carry to a server."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.proxy_inference.remote.steering import push
from services.proxy_inference.remote.tail import NOTHING, Filled, Told, fill

Row = NDArray[np.float64]
WIDE = 32_000


def logs(logits: NDArray[np.floating]) -> Row:
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def told(large: Row, k: int, named: NDArray[np.bool_] | None = None) -> Told:
    """What a server says of `large`: its k likeliest, those without a name only by their mass."""
    top = np.argsort(-large, kind="stable")[:k]
    bound = float(logs(large)[top].min()) if k else 0.0
    kept = top if named is None else top[named[top]]
    return Told(kept.astype(np.int64), logs(large)[kept], bound)


def filled(large: Row, base: Row, k: int) -> Filled:
    return fill(told(large, k), base, np.zeros(len(base), bool))


def apart(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Total variation."""
    return 0.5 * float(np.abs(np.exp(logs(one)) - np.exp(logs(other))).sum())


@st.composite
def rows(draw: st.DrawFn) -> tuple[Row, Row, int]:
    size = draw(st.integers(2, 300))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.01, 1.0, 4.0, 12.0]))
    large = random.normal(0.0, spread, size)
    base = random.normal(0.0, draw(st.sampled_from([0.01, 2.0, 20.0, 200.0])), size)
    return large, base, draw(st.integers(0, size))


@given(rows())
def test_it_sums_to_one_and_keeps_what_was_told(case: tuple[Row, Row, int]) -> None:
    large, base, k = case
    found = filled(large, base, k)
    assert np.isfinite(found.logits).all()
    assert np.exp(found.logits).sum() == pytest.approx(1.0, abs=1e-9)
    assert found.k == k
    top = np.argsort(-large, kind="stable")[:k]
    np.testing.assert_allclose(found.logits[top], logs(large)[top], atol=1e-6)
    assert found.missing == pytest.approx(1.0 - np.exp(logs(large)[top]).sum(), abs=1e-9)


@given(rows())
def test_no_token_that_was_not_told_is_likelier_than_the_last_that_was(
    case: tuple[Row, Row, int],
) -> None:
    large, base, k = case
    found = filled(large, base, k)
    if 0 < k < len(large):
        order = np.argsort(-large, kind="stable")
        assert found.logits[order[k:]].max() <= found.logits[order[k - 1]] + 1e-9


@given(rows())
def test_it_is_exact_where_everything_was_told(case: tuple[Row, Row, int]) -> None:
    large, base, _ = case
    found = filled(large, base, len(large))
    np.testing.assert_allclose(found.logits, logs(large), atol=1e-9)
    assert found.missing == pytest.approx(0.0, abs=1e-9)


@given(rows())
def test_where_nothing_was_told_the_small_base_speaks(case: tuple[Row, Row, int]) -> None:
    _, base, _ = case
    found = fill(NOTHING, base, np.zeros(len(base), bool))
    assert (found.k, found.missing) == (0, 1.0)
    assert apart(found.logits, base) < 1e-9


def test_the_tail_has_the_small_bases_shape() -> None:
    large, base = np.log([0.5, 0.3, 0.1, 0.06, 0.04]), np.log([0.1, 0.1, 0.2, 0.4, 0.2])
    found = filled(large, base, 2)
    np.testing.assert_allclose(np.exp(found.logits), [0.5, 0.3, 0.05, 0.1, 0.05], atol=1e-12)


def test_what_the_bound_keeps_from_one_token_goes_to_the_others() -> None:
    large, base = np.log([0.4, 0.2, 0.15, 0.15, 0.1]), np.log([0.1, 0.1, 0.7, 0.06, 0.04])
    found = filled(large, base, 2)
    np.testing.assert_allclose(np.exp(found.logits), [0.4, 0.2, 0.2, 0.12, 0.08], atol=1e-12)


def test_where_all_tokens_reach_the_bound_it_sums_to_one_all_the_same() -> None:
    """As rounding, or a server's other kernels, may have it."""
    told = Told(np.array([0, 1]), np.log([0.6, 0.1]), float(np.log(0.1)))
    found = fill(told, np.zeros(4), np.zeros(4, bool))
    np.testing.assert_allclose(np.exp(found.logits), np.array([6, 1, 1, 1]) / 9, atol=1e-12)


def test_a_token_without_a_name_may_be_the_likeliest() -> None:
    """As the token that ends a text, of which servers that speak text tell nothing."""
    large, base = np.log([0.9, 0.05, 0.03, 0.02]), np.log([0.4, 0.2, 0.2, 0.2])
    named = np.array([False, True, True, True])
    found = fill(told(large, 4, named), base, ~named)
    np.testing.assert_allclose(np.exp(found.logits), [0.9, 0.05, 0.03, 0.02], atol=1e-12)
    assert found.missing == pytest.approx(0.9)


def synthetic(seed: int) -> tuple[Row, Row, Row]:
    """A large row whose probabilities fall with their rank as words' do, a base row that is like
    it by and large, and a difference on a tenth of the tokens."""
    random = np.random.default_rng(seed)
    rank = 1.0 + random.permutation(WIDE)
    large = -1.6 * np.log(rank)
    base = -1.6 * np.log(rank) + random.normal(0.0, 1.0, WIDE)
    difference = np.where(random.random(WIDE) < 0.1, random.normal(0.0, 2.0, WIDE), 0.0)
    return large, base, difference


def restricted(large: Row, k: int) -> Row:
    few = np.full(len(large), -np.inf)
    top = np.argsort(-large)[:k]
    few[top] = large[top]
    return few


@pytest.mark.parametrize("k", [5, 20, 100, 500])
def test_it_is_nearer_to_the_exact_ensemble_than_the_told_tokens_alone(k: int) -> None:
    of_fill: list[float] = []
    of_few: list[float] = []
    for seed in range(12):
        large, base, difference = synthetic(seed)
        exact = large + difference
        of_fill.append(apart(filled(large, base, k).logits + difference, exact))
        of_few.append(apart(restricted(large, k) + difference, exact))
    assert np.mean(of_fill) < 0.75 * np.mean(of_few)
    assert np.mean(np.array(of_fill) < np.array(of_few)) > 0.8


def test_a_bias_carries_the_whole_difference_where_there_is_room() -> None:
    large, base, difference = (row[:2000] for row in synthetic(3))
    tuned = base + difference + 7.0  # what is constant says nothing
    sent = push(tuned, base, 1.0, most=2000, reach=100.0)
    biased = large.copy()
    biased[list(sent.bias)] += list(sent.bias.values())
    assert apart(biased, large + difference) < 0.02
    assert sent.clipped < 0.02
    assert len(sent.bias) < 400  # the median is the other tokens' own difference


def test_what_moves_all_tokens_alike_takes_no_entry() -> None:
    base = np.random.default_rng(1).normal(0.0, 1.0, 500)
    tuned = base.copy()
    tuned[7] += 12.0  # and so all others fall
    sent = push(tuned, base, 1.0, most=500, reach=100.0)
    assert sent.bias == {7: pytest.approx(12.0, abs=1e-3)}
    assert sent.clipped < 1e-6


def test_what_does_not_fit_into_a_bias_is_told() -> None:
    _, base, difference = (row[:2000] for row in synthetic(4))
    difference[np.argsort(-base)[:40:2]] += 2.0
    all_of_it = push(base + difference, base, 1.0, most=2000, reach=100.0)
    little = push(base + difference, base, 1.0, most=5, reach=100.0)
    short = push(base + difference, base, 1.0, most=2000, reach=0.5)
    assert len(little.bias) == 5
    assert max(abs(value) for value in short.bias.values()) == 0.5
    for less in (little, short):
        sent = np.zeros(len(base))
        sent[list(less.bias)] = list(less.bias.values())
        assert less.clipped == pytest.approx(apart(base + sent, base + difference), abs=0.01)
        assert less.clipped > all_of_it.clipped + 0.01


def test_a_requests_own_bias_is_never_left_out() -> None:
    base = np.zeros(50)
    tuned = np.linspace(0.0, 5.0, 50)
    sent = push(tuned, base, 1.0, most=3, reach=100.0, also={0: -100.0, 7: 0.01})
    assert set(sent.bias) > {0, 7}
    assert sent.bias[0] == -100.0  # as far as the server lets it
    assert len(sent.bias) == 3
