"""What the daemon decides: the fate of assigned work, when to send again, when to report.

Pure: time is an argument.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from shared.messages import Speed, WorkAssigned

RESEND_FIRST_S = 5.0
RESEND_CAP_S = 300.0
HURRIED = -2
"""The attempt that comes first after a reconnect: 1.25 s before the next, then 2.5 s, then 5 s."""
SPEED_SHARE = 0.3
"""What the newest measurement counts for in a speed."""
SPEED_CHANGE = 0.3
"""A speed that has moved by more than this part of what was reported is reported again."""

Fate = Literal["do", "wait", "passed", "held"]
Speeded = Literal["probe_s", "exact_s", "evaluate_s"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a job's adapter stands: after the close of `round`, read up to `sequence` of LOG."""

    sequence: int
    epoch: int
    round: int
    digest: str

    def text(self) -> str:
        """As it stands in a DeviceReport."""
        return f"{self.round}:{self.digest}"


def fate(assigned: WorkAssigned, position: Position | None, held: Container[str]) -> Fate:
    """Whether to do the work now, wait for the log, or let it be.

    `held`: measured already and in the spool. `passed`: the adapter has moved on, and nothing is
    ever measured at a wrong one.
    """
    key = assigned.key
    if key.text() in held:
        return "held"
    if position is None or key.epoch > position.epoch:
        return "wait"
    if key.epoch == position.epoch and assigned.digest == position.digest:
        return "do"
    if key.epoch < position.epoch or position.round >= key.round:
        return "passed"
    return "wait"


@dataclass(slots=True)
class Resends:
    """When each unsettled update is sent again: after 5 s, then twice as long, up to 5 min."""

    _due: dict[str, tuple[float, int]] = field(default_factory=dict[str, tuple[float, int]])

    def add(self, key: str, now: float) -> None:
        """`key` has never been sent: it is due."""
        self._due[key] = (now, 0)

    def sent(self, key: str, now: float) -> None:
        """`key` was handed to the broker; an update settled meanwhile stays forgotten."""
        if key in self._due:
            _, attempt = self._due[key]
            wait_s = min(RESEND_CAP_S, RESEND_FIRST_S * 2.0 ** min(attempt, 30))
            self._due[key] = (now + wait_s, attempt + 1)

    def forget(self, key: str) -> None:
        self._due.pop(key, None)

    def hurry(self, now: float) -> None:
        """The link is back: everything is due at once.

        And sooner again than ever: a broker that was restarted has no stream for updates until the
        aggregator has found it too.
        """
        self._due = dict.fromkeys(self._due, (now, HURRIED))

    def due(self, now: float) -> list[str]:
        """What should be sent by `now`, oldest first."""
        return [key for key, (at, _) in self._due.items() if at <= now]

    def next_s(self, now: float) -> float | None:
        """How long until something is due; None where nothing waits."""
        return max(0.0, min(at for at, _ in self._due.values()) - now) if self._due else None


@dataclass(slots=True)
class Speeds:
    """What a job's work takes on this device, as exponential moving averages."""

    _measured: dict[str, Speed] = field(default_factory=dict[str, Speed])
    _reported: dict[str, Speed] = field(default_factory=dict[str, Speed])

    def learn(self, job: str, what: Speeded, seconds: float) -> bool:
        """Count one measurement; whether the change is worth a report."""
        before = self._measured.get(job, Speed(job))
        old: float = getattr(before, what)
        new = seconds if not old else old + SPEED_SHARE * (seconds - old)
        self._measured[job] = replace(before, **{what: new})
        told: float = getattr(self._reported.get(job, Speed(job)), what)
        return not told or abs(new - told) > SPEED_CHANGE * told

    def report(self) -> list[Speed]:
        """All speeds, which count as reported from now on."""
        self._reported = dict(self._measured)
        return list(self._measured.values())

    def forget(self, job: str) -> None:
        self._measured.pop(job, None)


def snapshot_is_faster(
    *,
    rounds: int,
    round_bytes: float,
    apply_s: float,
    snapshot_bytes: int,
    bytes_per_s: float,
    request_s: float = 0.05,
) -> bool:
    """Whether fetching a snapshot takes less time than replaying `rounds` up to it.

    Either moves bytes over a link of `bytes_per_s`; a replay applies each round for `apply_s` too,
    a snapshot costs about two requests more.
    """
    replay_s = rounds * (round_bytes / bytes_per_s + apply_s)
    return snapshot_bytes / bytes_per_s + 2 * request_s < replay_s
