"""One device as telemetry sees it: what it said, what it did, and what it does now.

Only what is heard counts. A device without work may be silent for long, so silence alone says
nothing; work that never came back does.
"""

from typing import Literal

import msgspec

from shared.messages import STOPPED, DecisionMade, DeviceReport

Standing = Literal["working", "waiting", "away", "problem"]
STANDINGS: tuple[Standing, ...] = ("working", "waiting", "away", "problem")

OVERDUE_SHARE = 1.5
"""Work is overdue past so many deadlines of its round."""
OVERDUE_S = 5.0
"""And so much longer: what a slow link may take."""
UNKNOWN_DEADLINE_S = 600.0
"""For work of a round whose opening was not seen."""


class Hand(msgspec.Struct):
    """A piece of work that is out with a device. Times are the caller's clock, seconds."""

    job: str
    round: int
    part: int
    kind: str
    probes: int
    since: float
    until: float
    """Past this it is overdue."""


class DeviceRow(msgspec.Struct):
    """One device: what it last said of itself, and what it has done since telemetry knows it."""

    device: str
    own_series: bool = True
    report: DeviceReport | None = None
    job: str = ""
    round: int = 0
    """The last it contributed to."""
    rounds: int = 0
    probes: int = 0
    weight: int = 0
    work_s: float = 0.0
    late: int = 0
    settled: dict[str, int] = {}
    heard: float | None = None
    """When it was last heard of, by the caller's clock; None: not since telemetry started."""
    hand: Hand | None = None
    lost: str = ""
    """Which work it took and never brought back, if nothing was heard of it since."""
    standing: Standing = "away"
    unable: dict[str, str] = {}
    """By job that has not ended, why it cannot help with it."""

    def hears(self, now: float) -> None:
        """The device is there."""
        self.heard, self.lost = now, ""

    def takes(self, decision: DecisionMade, deadline_s: float, now: float) -> None:
        """It has been given a piece of work."""
        self.hears(now)
        self.job = decision.job
        until = now + OVERDUE_SHARE * (deadline_s or UNKNOWN_DEADLINE_S) + OVERDUE_S
        self.hand = Hand(
            decision.job,
            decision.round,
            decision.part,
            decision.kind,
            decision.probes,
            since=now,
            until=until,
        )

    def brings(self, key: str, now: float) -> None:
        """The update `key` (the text of an UpdateKey) has been settled."""
        self.hears(now)
        hand = self.hand
        if hand is not None:
            job, _, round, _, part = (key.split(".") + [""] * 5)[:5]
            if (job, round, part) == (hand.job, str(hand.round), str(hand.part)):
                self.hand = None

    def gives_up(self, now: float) -> bool:
        """Whether its work was overdue; it is in its hand no more."""
        hand = self.hand
        if hand is None or hand.until > now:
            return False
        if self.heard is None or self.heard <= hand.since:
            self.lost = f"took work of round {hand.round} and has not been heard of since"
        self.hand = None
        return True

    def stands(self) -> Standing:
        """What it does, by all that is known of it."""
        report = self.report
        if report is not None and report.problem:
            return "away" if report.problem.endswith(STOPPED) else "problem"
        if self.hand is not None:
            return "working"
        if self.heard is None or self.lost:
            return "away"
        return "problem" if self.unable else "waiting"

    def why(self) -> str:
        """Why it stands so, where that needs a word; one line, and not to be trusted."""
        report = self.report
        if report is not None and report.problem:
            return "stopped" if report.problem == STOPPED else report.problem
        if self.standing == "away":
            return self.lost or "not heard of since telemetry started"
        return ""
