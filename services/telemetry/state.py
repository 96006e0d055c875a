"""All that telemetry knows: jobs, devices, services; bounded, and rebuilt by reading again.

Pure: messages go in, and what `http` and `metrics` show is read out.
"""

import msgspec

from services.telemetry.history import JobHistory
from shared.messages import (
    DecisionMade,
    DeviceReport,
    LogEvent,
    RoundReport,
    ServiceReport,
    UpdateSettled,
)

MAX_JOBS = 1_000
MAX_DEVICES = 100_000
MAX_SERVICES = 1_000
MAX_SERIES = 1_000
"""So many devices get counters of their own; those of all others are shown as one."""


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


class State:
    """Everything shown; each `on_` method takes in one message."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobHistory] = {}
        self.devices: dict[str, DeviceRow] = {}
        """Least recently heard of first."""
        self.services: dict[str, ServiceReport] = {}
        self.others: dict[str, int] = {}
        """Counters of the devices without series of their own."""
        self.decisions: dict[str, int] = {}
        """Work assigned, by kind."""
        self.settled: dict[str, int] = {}
        """Updates settled, by outcome."""
        self.devices_seen = 0
        self._series = 0

    def on_event(self, event: LogEvent) -> None:
        """One fact of a job's public log."""
        self._job(event.job).evolve(event)

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

    def on_device_report(self, report: DeviceReport) -> None:
        device = self._device(report.device)
        if not device.own_series:
            before = device.report.counters if device.report else {}
            for name, count in report.counters.items():
                increase = count - before.get(name, 0)
                # A device that started anew counts from nought.
                self.others[name] = self.others.get(name, 0) + (
                    increase if increase >= 0 else count
                )
        device.report = report

    def on_service_report(self, report: ServiceReport) -> None:
        if report.service in self.services or len(self.services) < MAX_SERVICES:
            self.services[report.service] = report

    def on_decision(self, decision: DecisionMade) -> None:
        if decision.kind in self.decisions or len(self.decisions) < 100:
            self.decisions[decision.kind] = self.decisions.get(decision.kind, 0) + 1

    def on_settled(self, device: str, settled: UpdateSettled) -> None:
        self.settled[settled.outcome] = self.settled.get(settled.outcome, 0) + 1
        counts = self._device(device).settled
        counts[settled.outcome] = counts.get(settled.outcome, 0) + 1

    def _job(self, name: str) -> JobHistory:
        job = self.jobs.get(name)
        if job is None:
            if len(self.jobs) >= MAX_JOBS:
                ended = (job.job for job in self.jobs.values() if job.status == "ended")
                del self.jobs[next(ended, next(iter(self.jobs)))]
            job = self.jobs[name] = JobHistory(name)
        return job

    def _device(self, name: str) -> DeviceRow:
        device = self.devices.pop(name, None)
        if device is None:
            self.devices_seen += 1
            if len(self.devices) >= MAX_DEVICES:
                gone = self.devices.pop(next(iter(self.devices)))
                self._series -= gone.own_series
            device = DeviceRow(name, own_series=self._series < MAX_SERIES)
            self._series += device.own_series
        self.devices[name] = device
        return device
