"""What the modes came to on one data set, as numbers and as a Markdown table."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from services.proxy_inference.routing import Judge, Route
from services.proxy_inference.routing import table as routed
from shared.engine.model import Losses
from tests.bench.figure import Figure
from tests.bench.learn.curve import Point
from tests.bench.proxy.plan import ALPHAS, LARGE, PARAMETERS, SMALL

TITLES = {
    "large": "large alone",
    "small_base": "small alone, as it was",
    "small": "small alone, tuned by the fleet",
    "ensemble_0.5": "ensemble, alpha 0.5",
    "ensemble_1": "ensemble, alpha 1",
    "ensemble_1.5": "ensemble, alpha 1.5",
    "distilled": "small alone, distilled",
    "distilled_answers": "small alone, distilled, public answers taught too",
    "routed": "what routing serves",
    "ceiling": "large, tuned directly",
}
"""By mode, in the table's order."""


@dataclass(frozen=True, slots=True)
class Line:
    """One mode over the held-out rows; errors are standard errors of the mean."""

    mode: str
    accuracy: float
    accuracy_error: float
    loss: float
    loss_error: float


@dataclass(frozen=True)
class Quality:
    """One data set: `heldout` and `validation` are losses by mode."""

    dataset: str
    judge: Judge
    heldout: Mapping[str, Losses]
    validation: Mapping[str, Losses]
    ceiling: Point
    """Of the large model tuned directly, in float, over the held-out rows."""
    in_float: Point
    """The large model alone, in float."""
    took_s: float
    """All steps together, each on one core."""

    @property
    def route(self) -> Route:
        """What the proxy would serve by the validation rows."""
        routes = {Route("small"): "small", Route("large"): "large"}
        routes |= {Route("ensemble", alpha): f"ensemble_{alpha:g}" for alpha in ALPHAS}
        measured = {route: self.validation[mode] for route, mode in routes.items()}
        return routed(measured, self.judge).best

    @property
    def lines(self) -> list[Line]:
        """In the order of TITLES."""
        route = self.route
        chosen = route.mode if route.alpha is None else f"{route.mode}_{route.alpha:g}"
        found = {mode: _line(mode, losses) for mode, losses in self.heldout.items()}
        found["routed"] = _line("routed", self.heldout[chosen])
        top = self.ceiling
        found["ceiling"] = Line("ceiling", top.accuracy, 0.0, top.loss, 0.0)
        return [found[mode] for mode in TITLES if mode in found]

    def figures(self) -> list[Figure]:
        """Accuracy in percent, or nats a token; the baseline is the large model alone."""
        lines = {line.mode: line for line in self.lines}

        def value(line: Line) -> float:
            return 100.0 * line.accuracy if self.judge == "accuracy" else line.loss

        unit = "%" if self.judge == "accuracy" else "nats/token"
        alone = value(lines["large"])
        return [
            Figure(f"proxy.quality.{self.dataset}.{mode}", value(line), unit, alone)
            for mode, line in lines.items()
        ]

    def markdown(self) -> str:
        """The table; what is closed of the gap is (mode - large) / (directly tuned - large)."""
        by_mode = {line.mode: line for line in self.lines}
        alone, top = by_mode["large"], by_mode["ceiling"]
        choices = self.judge == "accuracy"
        heads = ["mode", *(["accuracy", "of the gap"] if choices else [])]
        heads += ["loss", "of the gap"]
        rows = len(self.heldout["large"].loss)
        sizes = ", ".join(
            f"{name} {PARAMETERS[model] / 1e6:.1f} M"
            for name, model in (("large", LARGE), ("small", SMALL))
        )
        per = "row" if choices else "token"
        text = [
            f"**{self.dataset}**: {rows} held-out rows; parameters: {sizes}; Q8_0; loss in nats a "
            f"{per}. By {len(self.validation['large'].loss)} validation rows routing serves "
            f"{self.route}.\n",
            f"| {' | '.join(heads)} |",
            f"|{'---|' * len(heads)}",
        ]
        for mode, line in by_mode.items():
            cells = [TITLES[mode]]
            if choices:
                cells.append(_with_error(100 * line.accuracy, 100 * line.accuracy_error, 1, " %"))
                cells.append(_share(line.accuracy, alone.accuracy, top.accuracy))
            cells.append(_with_error(line.loss, line.loss_error, 3, ""))
            cells.append(_share(line.loss, alone.loss, top.loss))
            text.append(f"| {' | '.join(cells)} |")
        before = f"{self.in_float.loss:.3f}"
        if choices:
            before = f"{100 * self.in_float.accuracy:.1f} % and {before}"
        text.append(
            "\nErrors are standard errors. The directly tuned one is in float; in float the large "
            f"model alone has {before}. All of it took one core {self.took_s / 60:.0f} minutes."
        )
        return "\n".join(text) + "\n"


def _line(mode: str, losses: Losses) -> Line:
    rows = len(losses.loss)
    mean = float(losses.loss.sum() / losses.weight.sum())
    left = losses.loss - mean * losses.weight
    more = rows / (rows - 1)
    return Line(
        mode,
        float(losses.right.mean()),
        float(np.sqrt(losses.right.var() * more / rows)),
        mean,
        float(np.sqrt(more * (left @ left)) / losses.weight.sum()),
    )


def _with_error(value: float, error: float, digits: int, unit: str) -> str:
    told = f"{value:.{digits}f}"
    return f"{told} ± {error:.{digits}f}{unit}" if error else f"{told}{unit}"


def _share(value: float, alone: float, top: float) -> str:
    return f"{round(100 * (value - alone) / (top - alone))} %"
