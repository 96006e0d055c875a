"""One device as the scheduler knows it, whatever the job."""

from dataclasses import dataclass

from shared.messages import DeviceReport, UpdateKey

ANSWER_S = 3.0
"""A device that has not answered a call for so long is not called again before it is heard."""


@dataclass(slots=True)
class Device:
    """What it said of itself, when it was last heard, and what it has in hand."""

    name: str
    seen: float
    report: DeviceReport | None = None
    reported_at: float = 0.0
    kinds: frozenset[str] | None = None
    """Of work that it does, as it last said; None: it has not asked yet."""
    tokens_per_s: float = 0.0
    """What it sent through its model between its last two reports."""
    key: UpdateKey | None = None
    kind: str = ""
    until: float = 0.0
    """When the work in its hand is no longer waited for."""
    called_at: float | None = None
    """When it was called; None if it has been heard since."""

    def does(self, kind: str) -> bool:
        """Whether it may be called for work of this kind."""
        return self.kinds is None or kind in self.kinds

    def works(self, now: float) -> bool:
        return self.key is not None and now < self.until

    def present(self, now: float) -> bool:
        """Whether it has answered its last call, or still may."""
        return self.called_at is None or now < self.called_at + ANSWER_S

    def heard(self, report: DeviceReport, now: float) -> None:
        """It has said what it is and has."""
        if self.report is not None and now > self.reported_at:
            before = self.report.counters.get("tokens_forward", 0)
            tokens = report.counters.get("tokens_forward", 0) - before
            self.tokens_per_s = max(0, tokens) / (now - self.reported_at)
        self.report, self.reported_at = report, now


def evaluates(report: DeviceReport) -> bool:
    """Whether it may be asked to measure the adapter on its held-out rows."""
    return report.trusted and report.heldout_rows > 0
