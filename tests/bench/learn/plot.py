"""Curves as a PNG: what each row's adapter is worth by the forward tokens that it took."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from tests.bench.learn.curve import Curve
from tests.bench.learn.settings import ROWS, measure
from tests.bench.learn.table import Curves

COLOURS = ("#7f7f7f", "#8c564b", "#e377c2", "#1f77b4", "#bcbd22", "#d62728", "#2ca02c")
"""By the order of ROWS."""


def plot(found: Mapping[str, Curves], path: Path) -> None:
    """`path` shows a panel for each data set, a line for each row and seed."""
    mpl.use("Agg")
    from matplotlib import pyplot  # after the backend is chosen

    figure: Any
    figure, panels = pyplot.subplots(
        1, len(found), figsize=(5.5 * len(found), 4.2), squeeze=False, layout="constrained"
    )
    for panel, (dataset, curves) in zip(panels[0], found.items(), strict=True):
        _draw(panel, dataset, curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(panel: Any, dataset: str, curves: Curves) -> None:
    judged = measure(dataset)
    named: set[str] = set()
    for (row, _), curve in sorted(curves.items(), key=lambda item: ROWS.index(item[0][0])):
        tokens, values = _steps(curve, judged)
        panel.plot(
            tokens,
            values,
            color=COLOURS[ROWS.index(row)],
            linewidth=1.2 if row != "seedwire" else 2.0,
            alpha=0.85,
            label="_" if row in named else row,
        )
        named.add(row)
    panel.set_xscale("log")
    panel.set_title(dataset)
    panel.set_xlabel("forward tokens, all devices")
    panel.set_ylabel(f"held-out {judged}")
    panel.grid(visible=True, alpha=0.25)
    panel.legend(fontsize=8)


def _steps(curve: Curve, judged: str) -> tuple[list[float], list[float]]:
    """The points but the start, which a logarithm has no place for."""
    points = [point for point in curve.points if point.forward_tokens]
    return [float(p.forward_tokens) for p in points], [getattr(p, judged) for p in points]
