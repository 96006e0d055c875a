"""The quality table of the proxy's benchmark: what it says follows from the losses by row."""

import numpy as np
import pytest

from shared.engine.model import Losses
from tests.bench.learn.curve import Point
from tests.bench.proxy.plan import ALPHAS
from tests.bench.proxy.table import Quality


def by_mode(**right: int) -> dict[str, Losses]:
    """A hundred rows of choices, so many of them right in each mode."""
    return {
        mode: Losses(
            np.full(100, 2.0 - count / 100), np.ones(100, np.int64), np.arange(100) < count
        )
        for mode, count in right.items()
    }


def a_table(*, heldout: dict[str, Losses], validation: dict[str, Losses]) -> Quality:
    def point(loss: float, accuracy: float) -> Point:
        return Point(1, 1, loss, accuracy, 60.0, 0.0, 0.0)

    ceiling, in_float = point(1.0, 0.8), point(1.8, 0.2)
    return Quality("ag_news", "accuracy", heldout, validation, ceiling, in_float, 60.0)


def test_routing_looks_at_validation_rows_and_is_reported_on_others() -> None:
    ensembles = {f"ensemble_{alpha:g}": 50 for alpha in ALPHAS}
    heldout = by_mode(large=20, small_base=20, small=60, distilled=55, **ensembles)
    validation = by_mode(large=20, small_base=20, small=30, distilled=30, **ensembles)
    table = a_table(heldout=heldout, validation=validation)
    figures = {figure.name: figure for figure in table.figures()}
    assert table.route.alpha == 1.0
    routed = figures["proxy.quality.ag_news.routed"]
    assert (routed.value, routed.baseline) == (50.0, 20.0)
    assert figures["proxy.quality.ag_news.ceiling"].value == pytest.approx(80.0)


def test_what_is_closed_of_the_gap_is_told_by_accuracy_and_by_loss() -> None:
    modes = {f"ensemble_{alpha:g}": 50 for alpha in ALPHAS}
    losses = by_mode(large=20, small_base=20, small=65, **modes)
    text = a_table(heldout=losses, validation=losses).markdown()
    (line,) = [line for line in text.splitlines() if "tuned by the fleet" in line]
    # 65 of 20 to 80 percent; 1.35 of 1.8 to 1.0 nats.
    assert "| 75 % |" in line
    assert "| 56 % |" in line
    assert "large 3.4 M, small 1.3 M" in text
