"""How much a device finishes in time: a rule from measured speed, not an arm of the bandit."""

from dataclasses import dataclass, field

SAFE_SHARE = 0.6
"""Part of the remaining time that work may fill: devices get busy, links get slow."""
TRIAL_PROBES = 8
"""What a device of unknown speed is given first."""
FASTEST_S = 1e-6
"""No unit of work is believed to take less."""
NEWEST_SHARE = 0.5
"""What the newest measurement counts for."""


@dataclass(slots=True)
class Paces:
    """Seconds per unit of work (a probe, or an exact pass) of each device, for one job."""

    _seconds: dict[str, float] = field(default_factory=dict[str, float])

    def get(self, device: str) -> float | None:
        """None: never measured."""
        return self._seconds.get(device)

    def told(self, device: str, seconds: float) -> None:
        """The device says so itself (0: it does not know)."""
        if seconds > 0:
            self._seconds[device] = seconds

    def seen(self, device: str, seconds: float) -> None:
        """A finished piece of work took `seconds` a unit."""
        if seconds > 0:
            old = self._seconds.get(device, seconds)
            self._seconds[device] = old + NEWEST_SHARE * (seconds - old)


def fitting(remaining_s: float, unit_s: float | None) -> int:
    """How many units a device surely finishes in the remaining time."""
    if unit_s is None:
        return TRIAL_PROBES if remaining_s > 0 else 0
    return max(0, int(SAFE_SHARE * remaining_s / max(FASTEST_S, unit_s)))
