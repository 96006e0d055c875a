"""Which mode answers a task: what each comes to on the same rows, and the cheapest that is best.

A tuned small model may answer better than the ensemble it steers, so none is taken on trust. A
costlier mode serves only where it beats the cheaper one by more than the standard error of the
difference, row by row on the same rows: what the large model does not earn, nobody pays. Pure.

Source: Cochran, Sampling Techniques (1977), section 2.11: the error of a ratio of two sums, here of
nats or right answers to tokens or rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.engine.model import Losses

Mode = Literal["small", "large", "ensemble"]
Judge = Literal["accuracy", "loss"]
"""Choices are judged by the share of rows answered right, texts by nats a token."""

BY_COST: tuple[Mode, ...] = ("small", "large", "ensemble")
_REMEMBERED = 16
"""Versions; with a table each of a few hundred bytes."""
_MORE = 1.0 + 1e-9
"""One row alone gains exactly its own error, but for rounding."""


@dataclass(frozen=True, slots=True)
class Route:
    """A way to answer; `alpha` is the ensemble's strength, None of the other modes."""

    mode: Mode
    alpha: float | None = None

    def __str__(self) -> str:
        return self.mode if self.alpha is None else f"{self.mode} at alpha {self.alpha:g}"


@dataclass(frozen=True, slots=True)
class Line:
    """What one route came to."""

    route: Route
    loss: float
    """Nats a token, or a row of choices."""
    accuracy: float
    """The share of rows whose every answer is the likeliest; of long texts near 0."""
    gain: float
    """Over the cheapest route: more accuracy, or less loss."""
    error: float
    """The standard error of `gain`."""


@dataclass(frozen=True, slots=True)
class Table:
    """All routes on `rows` validation rows, the cheapest first, and which of them serves."""

    rows: int
    judge: Judge
    lines: tuple[Line, ...]
    best: Route

    def told(self) -> dict[str, object]:
        """As JSON knows it; what is no finite number is null."""
        return {
            "rows": self.rows,
            "judged_by": self.judge,
            "best": {"mode": self.best.mode, "alpha": self.best.alpha},
            "routes": [
                {
                    "mode": line.route.mode,
                    "alpha": line.route.alpha,
                    "loss": _finite(line.loss),
                    "accuracy": _finite(line.accuracy),
                    "gain": _finite(line.gain),
                    "standard_error": _finite(line.error),
                    "best": line.route == self.best,
                }
                for line in self.lines
            ],
        }


class Routes:
    """What was measured of the versions that served, the newest last."""

    def __init__(self) -> None:
        self.problem = ""
        """Why the version that serves is not measured; empty if it is, or is being."""
        self.measuring = ""
        """The version that is being measured."""
        self._tables: dict[str, tuple[str, Table]] = {}

    def put(self, version: str, job: str, table: Table) -> None:
        """`version` of `job` has been measured."""
        self._tables.pop(version, None)
        self._tables[version] = job, table
        while len(self._tables) > _REMEMBERED:
            del self._tables[next(iter(self._tables))]

    def of(self, version: str) -> Table | None:
        return self._tables[version][1] if version in self._tables else None

    def best(self, version: str, job: str) -> Route | None:
        """What serves `version` best; until it is measured, what served its job best before."""
        found = self.of(version)
        if found is None:
            tables = [table for other, table in self._tables.values() if other == job]
            found = tables[-1] if tables else None
        return found.best if found else None

    @property
    def tables(self) -> dict[str, Table]:
        """By version."""
        return {version: table for version, (_, table) in self._tables.items()}


def table(measured: Mapping[Route, Losses], judge: Judge) -> Table:
    """What each route came to on the same rows in the same order, and the one to serve.

    Raises:
        ValueError: nothing was measured, or not all of it on as many rows.
    """
    if len({len(losses.loss) for losses in measured.values()} | {0}) != 2:
        raise ValueError("routes are compared on the same rows, of which there is at least one")
    ranked = sorted(measured, key=_cost)
    first = measured[ranked[0]]
    lines: list[Line] = []
    for route in ranked:
        found = measured[route]
        gain, error = gained(found, first, judge)
        loss, accuracy = float(found.loss.sum() / found.weight.sum()), float(found.right.mean())
        lines.append(Line(route, loss, accuracy, gain, error))
    return Table(len(first.loss), judge, tuple(lines), _best(measured, judge))


def gained(of: Losses, over: Losses, judge: Judge) -> tuple[float, float]:
    """How much better `of` is than `over` on the same rows, and the standard error of that.

    More accuracy, or less loss a token; not finite where a loss is not.
    """
    if judge == "accuracy":
        each, weight = of.right.astype(np.float64) - over.right, np.ones(len(of.right))
        each[~(np.isfinite(of.loss) & np.isfinite(over.loss))] = np.nan
    else:
        with np.errstate(invalid="ignore"):
            each, weight = over.loss - of.loss, of.weight.astype(np.float64)
    return _ratio(each, weight)


def _best(measured: Mapping[Route, Losses], judge: Judge) -> Route:
    """The cheapest, or the last that beat the one before it, mode by mode in the order of cost."""
    sound = {route: one for route, one in measured.items() if np.isfinite(one.loss).all()}
    if not sound:
        return min(measured, key=_cost)
    best = min(sound, key=_cost)
    for mode in BY_COST[BY_COST.index(best.mode) :]:
        gains = {
            route: gained(sound[route], sound[best], judge)
            for route in sound
            if route.mode == mode and route != best
        }
        if not gains:
            continue
        rival = max(gains, key=lambda route: (gains[route][0], -_force(route)))
        gain, error = gains[rival]
        if gain > error * _MORE:
            best = rival
    return best


def _ratio(each: NDArray[np.float64], weight: NDArray[np.float64]) -> tuple[float, float]:
    """sum(each) / sum(weight) and its standard error; of one row infinite."""
    count, total = len(each), float(weight.sum())
    ratio = float(each.sum()) / total
    if count < 2:
        return ratio, np.inf
    left = each - ratio * weight
    return ratio, float(np.sqrt(count / (count - 1) * (left @ left))) / total


def _cost(route: Route) -> tuple[int, float]:
    return BY_COST.index(route.mode), route.alpha or 0.0


def _force(route: Route) -> float:
    """How far the strength is from 1, at which nothing is scaled."""
    return abs((route.alpha or 1.0) - 1.0)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
