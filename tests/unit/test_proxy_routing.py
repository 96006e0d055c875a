"""Which mode serves, by what each came to on validation rows."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.proxy_inference.routing import BY_COST, Route, gained, table
from shared.engine.model import Losses

SMALL, LARGE = Route("small"), Route("large")
MILD, FULL = Route("ensemble", 0.5), Route("ensemble", 1.0)


def answered(right: Sequence[bool]) -> Losses:
    """Rows of choices; only whether they are right matters."""
    count = len(right)
    return Losses(np.ones(count), np.ones(count, np.int64), np.array(right, np.bool_))


def read(
    loss: Sequence[float] | NDArray[np.float64], tokens: Sequence[int] | None = None
) -> Losses:
    """Rows of text with their summed losses."""
    weight = np.array(tokens or [1] * len(loss), np.int64)
    return Losses(np.array(loss, np.float64), weight, np.zeros(len(loss), np.bool_))


def share(right: int, of: int = 100) -> Losses:
    return answered([number < right for number in range(of)])


def test_the_cheaper_mode_serves_where_nothing_beats_it_by_more_than_the_error() -> None:
    # One row of a hundred more: a gain of 0.01 with an error of 0.01.
    assert table({SMALL: share(70), FULL: share(71)}, "accuracy").best == SMALL
    assert table({SMALL: share(70), FULL: share(73)}, "accuracy").best == FULL


def test_the_ensemble_has_to_beat_the_large_model_and_not_only_the_small_one() -> None:
    measured = {SMALL: share(40), LARGE: share(70), FULL: share(71)}
    assert table(measured, "accuracy").best == LARGE
    assert table({**measured, LARGE: share(39)}, "accuracy").best == FULL


def test_a_gain_counts_by_how_steadily_it_comes() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(3.0, 1.0, 50)
    steady = hard - 0.05 + random.normal(0.0, 0.05, 50)
    lucky = hard - 0.05 + random.normal(0.0, 2.0, 50)
    lucky += (hard - lucky).mean() - 0.05  # on average exactly as good as `steady` was meant to be
    assert table({SMALL: read(hard), FULL: read(steady)}, "loss").best == FULL
    assert table({SMALL: read(hard), FULL: read(lucky)}, "loss").best == SMALL


def test_of_two_strengths_the_better_one_serves_and_of_equals_the_plainer() -> None:
    measured = {SMALL: share(50), MILD: share(70), FULL: share(75)}
    assert table(measured, "accuracy").best == FULL
    assert table({**measured, MILD: share(80)}, "accuracy").best == MILD
    assert table({**measured, MILD: share(75)}, "accuracy").best == FULL


def test_a_text_counts_by_its_tokens() -> None:
    # The long text got better by more in all than the short one got worse.
    small, full = read([400.0, 3.0] * 20, [100, 1] * 20), read([380.0, 4.0] * 20, [100, 1] * 20)
    found = table({SMALL: small, FULL: full}, "loss")
    assert found.best == FULL
    assert found.lines[1].gain == pytest.approx(19 / 101)


def test_what_is_not_finite_never_serves_and_is_told_as_null() -> None:
    broken = Losses(np.full(100, np.nan), np.ones(100, np.int64), np.ones(100, np.bool_))
    found = table({SMALL: share(10), FULL: broken}, "accuracy")
    assert found.best == SMALL
    told = found.told()["routes"]
    assert isinstance(told, list)
    assert told[1]["loss"] is None
    assert told[1]["gain"] is None
    assert table({SMALL: broken, LARGE: share(1)}, "accuracy").best == LARGE


def test_the_table_tells_each_route_beside_the_cheapest() -> None:
    found = table({FULL: share(90), SMALL: share(70), LARGE: share(60)}, "accuracy")
    assert [line.route for line in found.lines] == [SMALL, LARGE, FULL]
    assert [line.accuracy for line in found.lines] == [0.7, 0.6, 0.9]
    assert [line.gain for line in found.lines] == pytest.approx([0.0, -0.1, 0.2])
    told = found.told()
    assert told["best"] == {"mode": "ensemble", "alpha": 1.0}
    assert told["rows"] == 100


def test_rows_that_differ_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same rows"):
        table({SMALL: share(3), FULL: share(3, 99)}, "accuracy")
    with pytest.raises(ValueError, match="same rows"):
        table({}, "accuracy")


def test_one_row_proves_nothing() -> None:
    assert table({SMALL: read([9.0]), FULL: read([1.0])}, "loss").best == SMALL


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_the_error_of_rows_of_one_token_is_the_textbook_s(each: list[float]) -> None:
    gain, error = gained(read([-one for one in each]), read([0.0] * len(each)), "loss")
    assert gain == pytest.approx(np.mean(each), abs=1e-9)
    assert error == pytest.approx(np.std(each, ddof=1) / math.sqrt(len(each)), abs=1e-9)


@given(st.lists(st.tuples(*[st.booleans()] * 4), min_size=2, max_size=60))
def test_what_serves_is_never_worse_than_the_small_model(rows: list[tuple[bool, ...]]) -> None:
    columns = [answered(list(column)) for column in zip(*rows, strict=True)]
    measured = dict(zip((SMALL, LARGE, MILD, FULL), columns, strict=True))
    best = table(measured, "accuracy").best
    gain, error = gained(measured[best], measured[SMALL], "accuracy")
    assert best == SMALL or gain > 0
    for route in measured:  # nor is it costlier for nothing than another that beats the small one
        gain, error = gained(measured[route], measured[SMALL], "accuracy")
        cheaper = BY_COST.index(route.mode) < BY_COST.index(best.mode)
        if cheaper and gain > error * 1.000001:
            assert gained(measured[best], measured[route], "accuracy")[0] > 0
