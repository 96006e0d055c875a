"""All that telemetry knows: jobs, devices, services; bounded, and rebuilt by reading again.

Pure: messages go in with the time they came, and what `http`, `view` and `metrics` show is read
out. What a reader has not seen yet, the journal says.
"""

from collections import deque
from collections.abc import Mapping

import msgspec

from services.telemetry.devices import STANDINGS, DeviceRow, Standing
from services.telemetry.history import JobHistory
from services.telemetry.journal import Journal
from shared.messages import (
    AdapterEvaluated,
    ConnectionRefused,
    DecisionMade,
    DeviceReport,
    JobEnded,
    LogEvent,
    ModelPublished,
    RoundClosed,
    RoundOpened,
    RoundReport,
    ServiceReport,
    UpdateSettled,
    UpdatesFolded,
)

MAX_JOBS = 1_000
MAX_DEVICES = 100_000
MAX_SERVICES = 1_000
MAX_SERIES = 1_000
"""So many devices get counters of their own; those of all others are shown as one."""
MAX_ARMS = 20_000
"""Of all jobs together; the one that was chosen longest ago goes first."""
MAX_NAMES = 100
"""Kinds of work and outcomes that are told apart."""
MAX_REFUSALS = 50

LINK_COUNTERS = ("link_bytes_in", "link_bytes_out", "reconnects")


class ArmRow(msgspec.Struct):
    """A device as one job's bandit saw it when it last gave it work."""

    job: str
    device: str
    round: int
    plays: int
    mean: float
    """Estimated reward, in [0, 1]."""
    index: float | None
    """Upper confidence bound; None: it had never been played."""
    reason: str


class Refusal(msgspec.Struct):
    """An update that was not counted, or a connection that was not let in."""

    at: float
    who: str
    what: str
    reason: str
    count: int = 1


class State:
    """Everything shown; each `on_` method takes in one message that came at `now`, seconds."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobHistory] = {}
        self.devices: dict[str, DeviceRow] = {}
        """Least recently heard of first."""
        self.services: dict[str, ServiceReport] = {}
        self.services_heard: dict[str, float] = {}
        """When each of them last reported."""
        self.others: dict[str, int] = {}
        """Counters of the devices without series of their own."""
        self.decisions: dict[str, int] = {}
        """Work assigned, by kind."""
        self.settled: dict[str, int] = {}
        """Updates settled, by outcome."""
        self.arms: dict[tuple[str, str], ArmRow] = {}
        """By job and device; chosen longest ago first."""
        self.standings: dict[Standing, int] = dict.fromkeys(STANDINGS, 0)
        """How many devices stand how."""
        self.links: dict[str, int] = dict.fromkeys(LINK_COUNTERS, 0)
        """What devices' links have counted, restarts included, since telemetry started."""
        self.refused_updates: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self.refused_connections: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self.connections_refused = 0
        self.devices_seen = 0
        self.journal = Journal()
        self._series = 0
        self._working: dict[str, None] = {}

    def on_event(self, event: LogEvent) -> None:
        """One fact of a job's public log."""
        self._job(event.job).evolve(event)
        mark = self.journal.mark
        mark("job", event.job, "")
        match event:
            case RoundOpened() | RoundClosed():
                mark("round", event.job, event.round)
            case AdapterEvaluated():
                mark("evaluation", event.job, event.round)
            case ModelPublished():
                mark("published", event.job, event.round)
            case JobEnded():
                self._ended(event.job)
            case _:
                pass

    def on_updates_folded(self, event: UpdatesFolded) -> None:
        """How far the open round is."""
        if self._job(event.job).fold(event):
            self.journal.mark("round", event.job, event.round)

    def on_round_report(self, report: RoundReport) -> None:
        """Who did what for a round; each round counts once."""
        row = self._job(report.job).row(report.round)
        if row.reported:
            return
        row.reported = True
        for contribution in report.contributions:
            device = self._device(contribution.device)
            device.job, device.round = report.job, report.round
            device.rounds += 1
            device.probes += contribution.probes
            device.weight += contribution.weight
            device.work_s += contribution.work_s
            device.late += contribution.late
            self._changed(device)

    def on_device_report(self, report: DeviceReport, now: float) -> None:
        device = self._device(report.device)
        before = device.report.counters if device.report else {}
        increases = {
            name: _increase(before.get(name, 0), count) for name, count in report.counters.items()
        }
        for name in LINK_COUNTERS:
            self.links[name] += increases.get(name, 0)
        if not device.own_series:
            for name, increase in increases.items():
                self.others[name] = self.others.get(name, 0) + increase
        device.report = report
        device.unable = {job: why for job, why in report.unable.items() if not self._is_over(job)}
        device.hears(now)
        self._changed(device)

    def on_service_report(self, report: ServiceReport, now: float) -> None:
        if report.service in self.services or len(self.services) < MAX_SERVICES:
            self.services[report.service] = report
            self.services_heard[report.service] = now
            self.journal.mark("service", "", report.service)

    def on_decision(self, decision: DecisionMade, now: float) -> None:
        """The scheduler gave a device work."""
        _count(self.decisions, decision.kind)
        job = self.jobs.get(decision.job)
        row = job.rounds.get(decision.round) if job else None
        device = self._device(decision.device)
        device.takes(decision, row.deadline_s if row else 0.0, now)
        self._working[device.device] = None
        self._changed(device)
        if decision.kind == "probe":
            self._arm(decision)

    def on_settled(self, device: str, settled: UpdateSettled, now: float) -> None:
        """An update has had its final word."""
        _count(self.settled, settled.outcome)
        row = self._device(device)
        row.settled[settled.outcome] = row.settled.get(settled.outcome, 0) + 1
        row.brings(settled.key, now)
        self._changed(row)
        if settled.outcome in ("rejected", "too_late"):
            what = f"{settled.outcome} {settled.key}"
            self.refused_updates.append(Refusal(now, device, what, settled.reason))
            self.journal.mark("refused", "", "updates")

    def on_refused(self, refused: ConnectionRefused, now: float) -> None:
        """Somebody was not let in."""
        self.connections_refused += refused.count
        who = refused.device or refused.name or "nameless"
        what = " ".join(part for part in (refused.host, refused.public_key[:12]) if part)
        self.refused_connections.append(Refusal(now, who, what, refused.reason, refused.count))
        self.journal.mark("refused", "", "connections")

    def on_time(self, now: float) -> None:
        """Work that is overdue by now is in nobody's hand."""
        for name in list(self._working):
            device = self.devices.get(name)
            if device is None or device.hand is None:
                del self._working[name]
            elif device.gives_up(now):
                del self._working[name]
                self._changed(device)

    def current(self) -> str:
        """The job that was opened last of those that run, or of all; empty: there is none."""
        running = [name for name, job in self.jobs.items() if job.status == "running"]
        return (running or list(self.jobs) or [""])[-1]

    def _ended(self, job: str) -> None:
        """Whatever kept devices from helping with the job is no problem any more."""
        for device in self.devices.values():
            if job in device.unable:
                device.unable = {name: why for name, why in device.unable.items() if name != job}
                self._changed(device)

    def _is_over(self, job: str) -> bool:
        known = self.jobs.get(job)
        return known is not None and known.status == "ended"

    def _job(self, name: str) -> JobHistory:
        job = self.jobs.get(name)
        if job is None:
            if len(self.jobs) >= MAX_JOBS:
                ended = (job.job for job in self.jobs.values() if job.status == "ended")
                gone = next(ended, next(iter(self.jobs)))
                del self.jobs[gone]
                self.journal.mark("job", gone, "")
            job = self.jobs[name] = JobHistory(name)
        return job

    def _device(self, name: str) -> DeviceRow:
        device = self.devices.pop(name, None)
        if device is None:
            self.devices_seen += 1
            if len(self.devices) >= MAX_DEVICES:
                gone = self.devices.pop(next(iter(self.devices)))
                self._series -= gone.own_series
                self.standings[gone.standing] -= 1
                self.journal.mark("device", "", gone.device)
            device = DeviceRow(name, own_series=self._series < MAX_SERIES)
            self._series += device.own_series
            self.standings[device.standing] += 1
        self.devices[name] = device
        return device

    def _changed(self, device: DeviceRow) -> None:
        """Its standing follows what is known of it now, and readers are told."""
        self.standings[device.standing] -= 1
        device.standing = device.stands()
        self.standings[device.standing] += 1
        self.journal.mark("device", "", device.device)

    def _arm(self, decision: DecisionMade) -> None:
        key = (decision.job, decision.device)
        self.arms.pop(key, None)
        self.arms[key] = ArmRow(
            decision.job,
            decision.device,
            decision.round,
            decision.plays,
            decision.mean,
            decision.index if decision.plays else None,
            decision.reason,
        )
        self.journal.mark("arm", decision.job, decision.device)
        if len(self.arms) > MAX_ARMS:
            job, device = next(iter(self.arms))
            del self.arms[job, device]
            self.journal.mark("arm", job, device)


def _count(counts: dict[str, int], name: str) -> None:
    if name in counts or len(counts) < MAX_NAMES:
        counts[name] = counts.get(name, 0) + 1


def _increase(before: int, after: int) -> int:
    """How much a counter has grown; one that starts anew counts from nought."""
    return after - before if after >= before else after


def counter(services: Mapping[str, ServiceReport], service: str, name: str) -> int:
    """What a service counted, 0 where it has not said."""
    report = services.get(service)
    return report.counters.get(name, 0) if report else 0
