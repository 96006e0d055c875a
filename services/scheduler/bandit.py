"""Which devices are worth calling: discounted upper confidence bounds, one arm a device.

Source: Garivier & Moulines, "On Upper-Confidence Bound Policies for Switching Bandit Problems",
ALT 2011, D-UCB: index = X + 2 B sqrt(xi log n / N), where N (one arm) and n (all) count plays
discounted by gamma a step, X is the arm's discounted mean reward, and B = 1 bounds rewards.
With gamma = 1 and xi = 1/2 it is UCB1 (Auer, Cesa-Bianchi & Fischer 2002, figure 1).
Differs in: a round plays many arms, so time passes once a round, not once a play; arms join late,
so an arm never played has an infinite index.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop
from math import inf, log, sqrt

DISCOUNT = 0.98
"""gamma: a reward counts half after 34 rounds, since slopes fall and devices get busy."""
EXPLORATION = 0.6
"""xi; the theorem holds above 1/2."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Sufficient statistics of one device, discounted up to `step`."""

    plays: int = 0
    weight: float = 0.0
    reward: float = 0.0
    step: int = 0

    def at(self, step: int, discount: float) -> "Arm":
        """The same arm, seen from a later step."""
        factor = discount ** (step - self.step)
        return Arm(self.plays, self.weight * factor, self.reward * factor, step)

    @property
    def mean(self) -> float:
        return self.reward / self.weight if self.weight > 0 else 0.0


@dataclass(slots=True)
class Bandit:
    """All arms. Discounting is lazy: a step costs the same however many arms there are."""

    discount: float = DISCOUNT
    exploration: float = EXPLORATION
    step: int = 0
    total: float = 0.0
    """n: all discounted plays, as of `step`."""
    _arms: dict[str, Arm] = field(default_factory=dict[str, Arm])

    def arm(self, name: str) -> Arm:
        """What is known of one device as of now; nothing, if it was never played."""
        known = self._arms.get(name)
        return Arm(step=self.step) if known is None else known.at(self.step, self.discount)

    def advance(self) -> None:
        """One round has passed: everything known so far counts less."""
        self.step += 1
        self.total *= self.discount

    def play(self, name: str, reward: float) -> None:
        """Device `name` was chosen and earned `reward` in [0, 1]."""
        arm = self.arm(name)
        self._arms[name] = Arm(arm.plays + 1, arm.weight + 1, arm.reward + reward, self.step)
        self.total += 1

    def index(self, name: str) -> float:
        """The upper confidence bound; infinite for a device never played."""
        return self._index(self._arms.get(name), self._level)

    @property
    def _level(self) -> float:
        return self.exploration * log(max(self.total, 1.0))

    def _index(self, arm: Arm | None, level: float) -> float:
        if arm is None:
            return inf
        weight = arm.weight * self.discount ** (self.step - arm.step)
        return arm.mean + 2 * sqrt(level / weight) if weight > 0 else inf

    def ranked(
        self, names: Iterable[str], tie: Callable[[str], int] = lambda name: 0
    ) -> Iterator[tuple[str, float]]:
        """The devices with their indices, best first; ties by `tie`, then by name.

        One at a time: the few that a round wants cost no ordering of a whole fleet.
        """
        arms, level = self._arms, self._level
        heap = [(-self._index(arms.get(name), level), tie(name), name) for name in names]
        heapify(heap)
        while heap:
            negative, _, name = heappop(heap)
            yield name, -negative
