"""How much a device finishes in time: a rule from measured speed, not an arm of the bandit.

Source: Xu et al., FwdLLM, USENIX ATC 2024: as many perturbations a device as its speed allows, and
more devices before more perturbations each.
Differs in: shares are in proportion to measured speed, so that the devices of a round end together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

SAFE_SHARE = 0.6
"""Part of the remaining time that work may fill: devices get busy, links get slow."""
TRIAL_PROBES = 8
"""What a device of unknown speed is given first."""
WORTHWHILE_PROBES = 16
"""A further device costs a pass at theta: 3 % of so many probes, and a round ends the sooner."""
FASTEST_S = 1e-6
"""No unit of work is believed to take less."""
NEWEST_SHARE = 0.5
"""What the newest measurement counts for."""
FADING = 0.9
"""What is left of a pace that is too slow for a round after it: once it may have been a mishap."""
ROUNDING = 1e-6
"""Of a unit: equal speeds give equal shares."""


@dataclass(slots=True)
class Paces:
    """Seconds per unit of work (a probe, or an exact pass) of each device, for one job."""

    _seconds: dict[str, float] = field(default_factory=dict[str, float])

    def get(self, device: str) -> float | None:
        """None: never measured."""
        return self._seconds.get(device)

    def slower_than(self, seconds: float) -> set[str]:
        """Who takes longer than `seconds` for a unit."""
        return {device for device, unit_s in self._seconds.items() if unit_s > seconds}

    def fade(self, devices: Iterable[str]) -> None:
        """Doubt that these are so slow: who is never called never shows that it is not."""
        for device in devices:
            self._seconds[device] *= FADING

    def told(self, device: str, seconds: float) -> None:
        """The device says so itself (0: it does not know)."""
        if seconds > 0:
            self._seconds[device] = seconds

    def seen(self, device: str, seconds: float) -> None:
        """A finished piece of work took `seconds` a unit."""
        if seconds > 0:
            old = self._seconds.get(device, seconds)
            self._seconds[device] = old + NEWEST_SHARE * (seconds - old)


@dataclass(slots=True)
class Rates:
    """Units a second of the devices that share a round's work."""

    _rates: dict[str, float] = field(default_factory=dict[str, float])
    _sum: float = 0.0

    @classmethod
    def of(cls, devices: Iterable[str], paces: Paces) -> "Rates":
        """Those of `devices` whose speed is known."""
        rates = cls()
        for name in devices:
            if (unit_s := paces.get(name)) is not None:
                rates.learn(name, unit_s)
        return rates

    def learn(self, device: str, unit_s: float) -> None:
        """The device takes `unit_s` a unit."""
        rate = 1 / max(FASTEST_S, unit_s)
        self._sum += rate - self._rates.get(device, 0.0)
        self._rates[device] = rate

    def share(self, equal: int, unit_s: float | None) -> int:
        """A device's share of work of which each would have `equal` units if all were as fast.

        All end together, but for those that are still at their one unit; a device of unknown speed
        counts as one of the mean speed.
        """
        if unit_s is None or not self._rates:
            return equal
        span_s = equal * len(self._rates) / self._sum
        return max(1, int(span_s / max(FASTEST_S, unit_s) + ROUNDING))


def fitting(remaining_s: float, unit_s: float | None) -> int:
    """How many units a device surely finishes in the remaining time."""
    if unit_s is None:
        return TRIAL_PROBES if remaining_s > 0 else 0
    return max(0, int(SAFE_SHARE * remaining_s / max(FASTEST_S, unit_s)))
