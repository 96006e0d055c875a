"""What the faults of a plan do to links and disks while they last, and how long things take."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from shared import subjects
from shared.bus import Delivery
from tests.chaos.faults import Fault, Scenario


class Skies:
    """The weather of one schedule: `Weather` of every link, and the fates that the broker asks."""

    def __init__(
        self, scenario: Scenario, now: Callable[[], float], injected: Counter[str]
    ) -> None:
        self._faults = scenario.faults
        self._now = now
        self._injected = injected
        self._chance = random.Random(f"{scenario.seed} world")
        self._arrived: dict[str, float] = {}
        self.chances = {fault.number: fault.random(scenario.seed) for fault in scenario.faults}

    def uniform(self, least: float, most: float) -> float:
        """A number that the schedule's seed decides."""
        return self._chance.uniform(least, most)

    def active(self, who: str, *kinds: str) -> list[Fault]:
        """The windows that `who` is in now and whose chances say yes."""
        now = self._now()
        found: list[Fault] = []
        for fault in self._faults:
            if (
                fault.kind in kinds
                and fault.at_s <= now < fault.at_s + fault.for_s
                and who.startswith(fault.who)
                and self.chances[fault.number].random() < (fault.share or 1.0)
            ):
                self._injected[fault.kind] += 1
                found.append(fault)
        return found

    def disk_s(self) -> float:
        """Most are quick; some card stalls now and then."""
        return self._chance.uniform(0, 3.0 if self._chance.random() < 0.03 else 0.02)

    def latency_s(self, client: str) -> float:
        return self._chance.uniform(0.001, 0.02)

    def copies(self, client: str) -> list[float]:
        found = self.active(client, "drop", "duplicate", "delay", "reorder")
        if not found:
            return [0.0]
        copies = [0.0]
        for fault in found:
            chance = self.chances[fault.number]
            match fault.kind:
                case "drop":
                    return []
                case "duplicate":
                    copies.append(chance.uniform(0.01, 30))
                case _:
                    copies = [chance.uniform(0.01, 20) for _ in copies]
        return copies

    def fails(self, client: str) -> bool:
        return bool(self.active(client, "call_failed"))

    def loses_ack(self, client: str) -> bool:
        return bool(self.active(client, "ack_lost"))

    def fate(self, client: str, delivery: Delivery) -> Sequence[float]:
        now = self._now()
        copies: list[float] = []
        for extra_s in self.copies(client):
            due = now + extra_s + self._chance.uniform(0.001, 0.02)
            if not extra_s:  # one connection keeps its order
                due = self._arrived[client] = max(due, self._arrived.get(client, 0.0) + 1e-6)
            copies.append(due - now)
        return copies

    def append_fate(self, subject: str, data: bytes) -> Literal["stored", "lost", "unanswered"]:
        if subject.startswith(f"{subjects.PREFIX}.blob"):
            return "stored"
        if self.active("aggregator", "append_lost"):
            return "lost"
        return "unanswered" if self.active("aggregator", "append_unanswered") else "stored"
