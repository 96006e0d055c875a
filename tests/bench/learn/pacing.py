"""When the judge measures, and when a run has gone far enough."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.learn.curve import Ended, Measure, Point

GROWTH = 1.15
"""The judge measures again when so many times the tokens have been spent,"""
MOST_POINTS = 30
"""but by tokens no more often than so in a run."""
LONGER = 1.5
"""A run that has reached its goal goes on to so many times the tokens of its best point."""
HOPELESS = 3.0
"""A run whose loss is so many times that of the start has diverged."""


@dataclass
class Pace:
    """How far one run may go, and where it is looked at."""

    budget_tokens: int
    commits_between: int
    goal: float | None = None
    measure: Measure = "accuracy"
    most_points: int = MOST_POINTS
    _commits: int = 0
    _tokens: int = 0

    def due(self, commits: int, tokens: int) -> bool:
        """Whether this commit is one to measure; if so, the next is counted from here."""
        next_tokens = max(
            self._tokens * GROWTH, self._tokens + self.budget_tokens / self.most_points
        )
        due = tokens >= min(next_tokens, self.budget_tokens)
        if due or commits - self._commits >= self.commits_between:
            self._commits, self._tokens = commits, tokens
            return True
        return False

    def verdict(self, points: Sequence[Point], tokens: int) -> Ended | None:
        """Why the run should end now, if it should."""
        if points and not points[-1].loss <= HOPELESS * points[0].loss:
            return "diverged"
        if tokens >= self.budget_tokens:
            return "budget"
        if self.goal is None or not points:
            return None
        sign = 1 if self.measure == "accuracy" else -1
        best = max(points, key=lambda point: sign * getattr(point, self.measure))
        reached = sign * getattr(best, self.measure) >= sign * self.goal
        return "goal" if reached and tokens > LONGER * best.forward_tokens else None
