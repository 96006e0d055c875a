"""`make bench NAME=learn`: runs what is not kept yet, then figures, a table and a plot.

DATASET names one of settings.PLACES or several (with commas; all if not set), SEEDS how many seeds
at most (3); QUICK=1 is one seed with seedwire, mezo and the ceiling (of fewer rounds where they
take long), of trec if nothing else is named, in minutes. LEARN_JOBS runs are made at once (2), each
one core's work. What was run is kept in `.bench/learn` (LEARN_CACHE), with the table `learn.md` and
the curves `learn.png`.
"""

import asyncio
import os
import sys
from dataclasses import dataclass

from tests.bench.figure import Figure
from tests.bench.learn.curve import Curve
from tests.bench.learn.orders import CACHE, order
from tests.bench.learn.settings import (
    FEW,
    OVER_OURS,
    PLACES,
    SHARES,
    Place,
    Table,
    budget,
    measure,
)
from tests.bench.learn.table import Curves, goal_of, lines, markdown, ratio
from tests.bench.learn.workers import Workers
from tests.bench.processes import RunFailed

FLAT_SHARE = 0.9
"""A run that has this share of the ceiling's gain, and gains nothing more, ends."""
QUICK_CEILING: dict[str, Table] = {"ag_news": {"rounds": 40}, "e2e_nlg": {"rounds": 40}}
"""Elsewhere all of the ceiling's rounds take minutes."""
AT = SHARES.index(0.75)


async def figures() -> list[Figure]:
    """Every figure of the data sets that were asked for.

    Raises:
        SystemExit: there is no such data set, or a run failed; says which.
    """
    quick = os.environ.get("QUICK", "") not in ("", "0")
    names = [one for one in os.environ.get("DATASET", "").split(",") if one]
    for one in names:
        if one not in PLACES:
            raise SystemExit(f"learn: no DATASET {one!r}; there are {', '.join(PLACES)}")
    names = names or (["trec"] if quick else list(PLACES))
    at_most = 1 if quick else int(os.environ.get("SEEDS") or 3)
    workers = Workers(int(os.environ.get("LEARN_JOBS") or 2))
    found: dict[str, dict[tuple[str, int], Curve]] = {one: {} for one in names}
    try:
        async with asyncio.TaskGroup() as group:
            for name in names:
                for seed in range(1, 1 + min(at_most, PLACES[name].seeds)):
                    one = _Seed(workers, PLACES[name], seed, found[name], quick=quick)
                    group.create_task(one.run())
    except* RunFailed as failed:
        first: BaseException = failed
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise SystemExit(str(first)) from None
    tables = "\n".join(markdown(one, lines(found[one], measure(one))) for one in names)
    (CACHE / "learn.md").write_text(tables, encoding="utf-8")
    print(tables, file=sys.stderr)
    from tests.bench.learn.plot import plot  # matplotlib only where there is something to draw

    plot(found, CACHE / "learn.png")
    return [figure for one in names for figure in _figures(one, found[one])]


@dataclass
class _Seed:
    """One seed of one place: the ceiling and seedwire first, which the others are measured by."""

    workers: Workers
    place: Place
    seed: int
    found: dict[tuple[str, int], Curve]
    quick: bool

    async def run(self) -> None:
        """Every row's curve is in `found`."""
        judged, dataset = measure(self.place.dataset), self.place.dataset
        changes = QUICK_CEILING.get(dataset) if self.quick else None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._made("ceiling", budget("ceiling", dataset), changes=changes))
            group.create_task(self._ours())
        goal = goal_of(self.found["ceiling", self.seed], judged, FLAT_SHARE)
        mine = {key: curve for key, curve in self.found.items() if key[1] == self.seed}
        ours = next(line for line in lines(mine, judged) if line.row == "seedwire")
        tokens = ours.costs[AT].tokens
        async with asyncio.TaskGroup() as group:
            for row in FEW if self.quick else self.place.rows:
                if (row, self.seed) not in self.found:
                    group.create_task(self._made(row, budget(row, dataset, tokens), goal))

    async def _ours(self) -> None:
        """Seedwire's curve; a quick look does not wait for the ceiling to let the other begin."""
        await self._made("seedwire", budget("seedwire", self.place.dataset))
        if self.quick:
            spent = self.found["seedwire", self.seed].last.forward_tokens
            await self._made("mezo", OVER_OURS * spent)

    async def _made(
        self,
        row: str,
        budget_tokens: int,
        goal: float | None = None,
        changes: Table | None = None,
    ) -> None:
        asked = order(
            row,
            self.place.dataset,
            self.seed,
            budget_tokens=budget_tokens,
            goal=goal,
            changes=changes,
            split=self.place.split,
            quantisation=self.place.quantisation,
        )
        self.found[row, self.seed] = await self.workers.curve(asked)


def _figures(dataset: str, curves: Curves) -> list[Figure]:
    name = f"learn.{dataset}"
    found = lines(curves, measure(dataset))
    best = next(line for line in found if line.row == "ceiling")
    figures = [Figure(f"{name}.ceiling.accuracy", best.accuracy, "")]
    for line in found:
        if line.row == "ceiling":
            continue
        cost = line.costs[AT]
        figures += [
            Figure(f"{name}.{line.row}.tokens_to_75", cost.tokens, "tokens", reached=cost.reached),
            Figure(f"{name}.{line.row}.accuracy", line.accuracy, "", best.accuracy),
        ]
    tokens_ratio = ratio(found)
    if tokens_ratio is not None:
        ours = next(line for line in found if line.row == "seedwire")
        reached = ours.costs[AT].reached
        target = 0.5 if measure(dataset) == "loss" else 0.1
        figures.append(
            Figure(f"{name}.tokens_ratio", tokens_ratio, "", target=target, reached=reached)
        )
    return figures
