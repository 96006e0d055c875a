"""What all runs came to, as numbers by row and as a Markdown table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tests.bench.learn.curve import Cost, Curve, Measure, mean, tokens_to
from tests.bench.learn.settings import FORWARD_ONLY, OVER_OURS, ROWS, SHARES

Curves = Mapping[tuple[str, int], Curve]
"""By row and seed, of one data set; every seed has a ceiling."""

HEADER = (
    "| method | tokens to 50 % | 75 % | 90 % | accuracy | loss | up, device | down, device "
    "| peak memory | wall time |\n|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: means over seeds."""

    row: str
    costs: tuple[Cost, ...]
    """By SHARES; reached only where every seed reached it."""
    accuracy: float
    loss: float
    up_bytes: float
    down_bytes: float
    peak_mb: float
    wall_s: float
    seeds: int


def lines(curves: Curves, measure: Measure) -> list[Line]:
    """A line for each row that was run, in the order of ROWS."""
    found = [
        _line(row, {seed: curve for (name, seed), curve in curves.items() if name == row})
        for row in ROWS
        if any(name == row for name, _ in curves)
    ]
    costs = {
        line.row: tuple(_cost(curves, line.row, share, measure) for share in SHARES)
        for line in found
    }
    return [replace(line, costs=_at_least(costs, line.row)) for line in found]


def ratio(found: Sequence[Line]) -> float | None:
    """Tokens of seedwire to 75 %, over the best other forward-only method's; None without one."""
    at = SHARES.index(0.75)
    by_row = {line.row: line.costs[at] for line in found}
    others = [by_row[row].tokens for row in FORWARD_ONLY if row in by_row]
    if "seedwire" not in by_row or not others:
        return None
    return by_row["seedwire"].tokens / min(others)


def markdown(dataset: str, found: Sequence[Line]) -> str:
    """The table of one data set."""
    seeds = max((line.seeds for line in found), default=0)
    title = f"**{dataset}**, mean of {seeds} seeds\n" if seeds > 1 else f"**{dataset}**, one seed\n"
    return "\n".join([title, HEADER, *(_markdown(line) for line in found)]) + "\n"


def goal_of(ceiling: Curve, measure: Measure, share: float) -> float:
    """The value of `measure` at `share` of the ceiling's gain."""
    start: float = getattr(ceiling.points[0], measure)
    return start + share * (ceiling.best(measure) - start)


def _line(row: str, by_seed: Mapping[int, Curve]) -> Line:
    runs = list(by_seed.values())
    last = [curve.last for curve in runs]
    return Line(
        row=row,
        costs=(),
        accuracy=mean([point.accuracy for point in last]),
        loss=mean([point.loss for point in last]),
        up_bytes=mean([point.up_bytes for point in last]),
        down_bytes=mean([point.down_bytes for point in last]),
        peak_mb=mean([curve.peak_mb for curve in runs]),
        wall_s=mean([point.wall_s for point in last]),
        seeds=len(runs),
    )


def _cost(curves: Curves, row: str, share: float, measure: Measure) -> Cost:
    costs: list[Cost] = []
    for (name, seed), curve in curves.items():
        if name == row:
            ceiling = curves["ceiling", seed]
            start: float = getattr(ceiling.points[0], measure)
            costs.append(tokens_to(curve, start, ceiling.best(measure), share, measure))
    return Cost(mean([cost.tokens for cost in costs]), all(cost.reached for cost in costs))


def _at_least(costs: Mapping[str, tuple[Cost, ...]], row: str) -> tuple[Cost, ...]:
    """What was not reached counts as at least ten times seedwire's tokens."""
    if row not in FORWARD_ONLY or "seedwire" not in costs:
        return costs[row]
    return tuple(
        cost if cost.reached else Cost(max(cost.tokens, OVER_OURS * ours.tokens), reached=False)
        for cost, ours in zip(costs[row], costs["seedwire"], strict=True)
    )


def _markdown(line: Line) -> str:
    cells = [
        line.row,
        *(_tokens(cost) for cost in line.costs),
        f"{100 * line.accuracy:.1f} %",
        f"{line.loss:.3f}",
        _bytes(line.up_bytes),
        _bytes(line.down_bytes),
        f"{line.peak_mb:.0f} MB",
        f"{line.wall_s:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def _tokens(cost: Cost) -> str:
    text = f"{cost.tokens / 1e6:.2f} M" if cost.tokens >= 1e6 else f"{cost.tokens / 1e3:.0f} k"
    return text if cost.reached else f"> {text}"


def _bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
