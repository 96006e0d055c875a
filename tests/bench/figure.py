"""One measured number, beside what it is compared with."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """`baseline` was measured in the same run, in the same unit; null where there is none."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    target: float | None = None
    """What DESIGN asks for, as printed beside it; not a baseline."""
    reached: bool | None = None
    """Whether what is counted came about; if not, `value` is what was spent on the attempt."""

    def line(self) -> str:
        ratio = self.value / self.baseline if self.baseline else None
        record: dict[str, object] = {
            "name": self.name,
            "value": _rounded(self.value),
            "unit": self.unit,
            "baseline": _rounded(self.baseline),
            "ratio": _rounded(ratio),
        }
        if self.target is not None:
            record["target"] = self.target
        if self.reached is not None:
            record["reached"] = self.reached
        return json.dumps(record)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
