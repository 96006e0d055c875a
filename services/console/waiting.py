"""Whom an open round waits for, as far as the scheduler's decisions and its list tell. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.console.listing import ago
from shared.messages import DecisionMade, DeviceSummary, LogEvent, RoundClosed, RoundOpened

LONG_S = 10.0
USUAL = 2.0
"""A round waits long after LONG_S, and so many times what the rounds before it took."""
NAMES_SHOWN = 5


@dataclass
class Waiting:
    """The open round of one job, and who was given work for it."""

    job: str
    round: RoundOpened | None = None
    since: float = 0.0
    usual_s: float = 0.0
    assigned: dict[str, float] = field(default_factory=dict[str, float])
    """When each device was last given work of this round."""

    def evolve(self, event: LogEvent, now: float) -> None:
        """Take in one fact of the job's log, which came at `now`."""
        match event:
            case RoundOpened():
                self.round, self.since, self.assigned = event, now, {}
            case RoundClosed():
                if self.round is not None:
                    taken_s = now - self.since
                    self.usual_s = 0.75 * self.usual_s + 0.25 * taken_s if self.usual_s else taken_s
                self.round = None
            case _:
                pass

    def decided(self, decision: DecisionMade, now: float) -> None:
        """Work was given to a device."""
        if self.round is not None and decision.round == self.round.round:
            self.assigned[decision.device] = now

    def long(self, now: float) -> bool:
        """Whether the open round takes longer than one would expect."""
        return self.round is not None and now - self.since > max(LONG_S, USUAL * self.usual_s)

    def for_whom(self, devices: Sequence[DeviceSummary], now: float) -> dict[str, str]:
        """The devices that are waited for, and what each of them is at.

        `now` is when the scheduler was asked for `devices`, or before: one that asks for work is
        seen before its work is known here, so one seen later has been heard since. Where fewer
        devices than are wanted have been heard at all since the round opened, those that took part
        before are waited for, too.
        """
        if self.round is None:
            return {}
        found: dict[str, str] = {}
        heard = sum(device.seen_s_ago < now - self.since for device in devices)
        # Without a decision heard, this watcher came later than the round's opening.
        too_few = bool(self.assigned) and heard < self.round.enough_devices
        for device in devices:
            at_it = device.job == self.job and f" round {self.round.round} " in device.doing
            given = self.assigned.get(device.device)
            if at_it:
                found[device.device] = device.doing.partition(" round ")[0]
            elif given is not None and device.seen_s_ago >= now - given:
                found[device.device] = f"not heard since {ago(device.seen_s_ago)}"
            elif given is not None and device.problem:
                found[device.device] = device.problem
            elif too_few and device.rounds and device.seen_s_ago >= now - self.since:
                found[device.device] = f"not heard since {ago(device.seen_s_ago)}"
        return found

    def told(self, whom: dict[str, str], now: float) -> str:
        """A sentence on what the open round waits for."""
        assert self.round is not None
        opened = self.round
        waited = (
            f"round {opened.round} is open for {now - self.since:.0f} s and closes "
            f"by {opened.deadline_s:.0f} s"
        )
        wanted = f"it wants {opened.enough_devices} devices" if opened.enough_devices > 1 else ""
        if not whom:
            return "; ".join(filter(None, [waited, wanted, "no device is at work for it"]))
        names = [f"{name} ({what})" for name, what in sorted(whom.items())]
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        waits = f"it waits for {', '.join(names[:NAMES_SHOWN])}{more}"
        return "; ".join(filter(None, [waited, wanted, waits]))
