"""All devices and jobs, evolved by facts; decides each answer and each call.

Pure: time and the seed are arguments. No answer costs more for a larger fleet; only the choice at
the opening of a round looks at every device.
"""

from collections import Counter
from dataclasses import dataclass
from heapq import nlargest
from math import inf
from zlib import crc32

from services.scheduler.devices import Device
from services.scheduler.jobs import Job, JobFact
from services.scheduler.offers import Offer, Selection
from services.scheduler.rounds import OpenRound
from shared.messages import (
    STOPPED,
    ComeBack,
    DecisionMade,
    DeviceReport,
    DevicesListed,
    DeviceSummary,
    EvaluateWork,
    JobEnded,
    JobOpened,
    ProbeWork,
    RequestWork,
    RoundReport,
    UpdateKey,
    WalkWork,
    WorkAssigned,
)
from shared.ranges import width

REPORT_WAIT_S = 5.0
"""When a device whose report is wanted comes again, if it is not woken before."""
REPORT_EVERY_S = 900.0
"""How often an idle device reports."""
LIVE_REPORTS = 2.5
"""A device that has been silent for so many reports is not called."""
MAX_LISTED = 2000
"""What fits a message."""
KINDS = ("probe", "walk", "evaluate")

Fact = JobOpened | JobEnded | DeviceReport | RequestWork | WorkAssigned | JobFact


@dataclass(frozen=True, slots=True)
class Answer:
    """What a device is told, and what the world is told of it."""

    message: WorkAssigned | ComeBack
    decision: DecisionMade | None = None


class State:
    """The scheduler after the facts it has been evolved by."""

    def __init__(self, *, idle_comeback_s: float, seed: int) -> None:
        self.jobs: dict[str, Job] = {}
        self.devices: dict[str, Device] = {}
        self._idle_comeback_s = idle_comeback_s
        self._live_s = LIVE_REPORTS * max(idle_comeback_s, REPORT_EVERY_S)
        self._salt = crc32(f"{seed}:".encode())
        self._rounds: Counter[str] = Counter()
        """To how many rounds of any job each device has contributed."""

    # ---- evolve

    def evolve(self, fact: Fact, now: float) -> None:
        """Apply one fact; facts of jobs that are not running change nothing."""
        match fact:
            case JobOpened():
                self.jobs[fact.job] = Job(fact)
            case JobEnded():
                self.jobs.pop(fact.job, None)
            case DeviceReport():
                self._evolve_report(fact, now)
            case RequestWork():
                self._evolve_request(fact, now)
            case WorkAssigned():
                self._evolve_assigned(fact, now)
            case Selection():
                self._evolve_selection(fact, now)
            case _:
                if isinstance(fact, RoundReport):
                    self._rounds.update(each.device for each in fact.contributions)
                if (job := self.jobs.get(fact.job)) is not None:
                    job.evolve(fact, now)

    # ---- decide

    def decide(self, request: RequestWork, now: float) -> Answer:
        """What the device of a request, which the state has been evolved by, should do."""
        device = self.devices[request.device]
        if device.report is None or device.report.problem.endswith(STOPPED):
            after_s = REPORT_WAIT_S * self._spread(device.name)
            reason = "this scheduler does not know the device: send a report"
            return Answer(ComeBack(after_s=after_s, reason=reason, report=True))
        reason = "no round is open" if self.jobs else "no job is running"
        for job, opened in self._open_rounds(device.name):
            offer = job.offer(opened, device.report, request.kinds, now)
            if isinstance(offer, Offer):
                return _assigned(job, opened, request, offer, now)
            reason = f"job {job.name}: {offer}"
        return Answer(ComeBack(after_s=self._after_s(device.name), reason=reason[:2000]))

    def plan(self, now: float) -> list[Selection]:
        """Whom each open round should call now; costs next to nothing while nothing is due."""
        devices = self.devices.values()
        selections = [
            job.select(devices, now - self._live_s, now, self._tie) for job in self.jobs.values()
        ]
        return [selection for selection in selections if selection is not None]

    def called(self, selection: Selection, now: float) -> list[str]:
        """The devices to wake for a selection; those that work come by themselves."""
        names = dict.fromkeys((*selection.evaluators, *selection.probers))
        return [name for name in names if not self._works(name, now)]

    def wanted_by(self, name: str, now: float) -> str:
        """The job that has work for a device that has just reported; empty: none."""
        device = self.devices.get(name)
        if device is None or device.report is None or device.works(now):
            return ""
        for job, opened in self._open_rounds(name):
            kinds = KINDS if device.kinds is None else device.kinds
            offer = job.offer(opened, device.report, kinds, now) if opened.wave else ""
            if isinstance(offer, Offer):
                return job.name
        return ""

    def listed(self, now: float) -> DevicesListed:
        """The devices that were seen last, for the operator."""
        newest = nlargest(MAX_LISTED, self.devices.values(), key=lambda each: each.seen)
        return DevicesListed(devices=[self._summary(device, now) for device in newest])

    # ---- inside

    def _evolve_report(self, report: DeviceReport, now: float) -> None:
        device = self._device(report.device, now)
        device.heard(report, now)
        for job in self.jobs.values():
            job.speeds(report)

    def _evolve_request(self, request: RequestWork, now: float) -> None:
        device = self._device(request.device, now)
        key, kind, device.key = device.key, device.kind, None
        device.kinds = frozenset(request.kinds)
        for job in self.jobs.values():
            if job.open is not None:
                job.open.asked(device.name, job.paces.get(device.name))
        if key is not None and (worked := self._round_of(key)) is not None:
            worked.returned(device.name, lost=request.last != key or bool(request.declined))
        last = request.last
        if not request.declined or last is None or last.device != device.name:
            return
        if (refused := self._round_of(last)) is not None:
            if last != key:  # given before a restart of ours
                kind = refused.kind if refused.opened.kind == "tune" else "evaluate"
            refused.declined(device.name, kind)

    def _evolve_selection(self, selection: Selection, now: float) -> None:
        for name in self.called(selection, now):
            if (device := self.devices.get(name)) is not None and device.called_at is None:
                device.called_at = now
        if (job := self.jobs.get(selection.job)) is not None:
            job.evolve(selection, now)

    def _evolve_assigned(self, assigned: WorkAssigned, now: float) -> None:
        key = assigned.key
        device = self._device(key.device, now)
        device.key, device.until = key, now + assigned.deadline_s
        device.kind = _kind(assigned.work)
        if (worked := self._round_of(key)) is not None:
            worked.given(assigned)

    def _round_of(self, key: UpdateKey) -> OpenRound | None:
        """The round of a key, if it is open."""
        job = self.jobs.get(key.job)
        if job is None or job.open is None:
            return None
        opened = job.open.opened
        return job.open if (opened.epoch, opened.round) == (key.epoch, key.round) else None

    def _device(self, name: str, now: float) -> Device:
        device = self.devices.setdefault(name, Device(name, now))
        device.seen, device.called_at = now, None
        return device

    def _works(self, name: str, now: float) -> bool:
        device = self.devices.get(name)
        return device is not None and device.works(now)

    def _open_rounds(self, name: str) -> list[tuple[Job, OpenRound]]:
        """What is open, those rounds first that have called this device."""
        opened = [(job, job.open) for job in self.jobs.values() if job.open is not None]
        return sorted(opened, key=lambda pair: not pair[1].has_called(name))

    def _summary(self, device: Device, now: float) -> DeviceSummary:
        key, report = device.key, device.report
        working = key is not None and device.works(now)
        job = key.job if key is not None and working else ""
        running = self.jobs.get(job) or next(iter(self.jobs.values()), None)
        return DeviceSummary(
            device=device.name,
            seen_s_ago=max(0.0, now - device.seen),
            job=job,
            doing=f"{device.kind} round {key.round} part {key.part}" if key and working else "",
            rows=report.rows if report else 0,
            rows_refused=_refused(report) if report else 0,
            tokens_per_s=device.tokens_per_s,
            rounds=self._rounds[device.name],
            reward=running.bandit.arm(device.name).mean if running else 0.0,
            problem=self._problem(report)[:400] if report else "has not reported yet",
        )

    def _problem(self, report: DeviceReport) -> str:
        """What the operator should know of; each running job's trouble under its name."""
        of_jobs = [f"job {job}: {why}" for job, why in report.unable.items() if job in self.jobs]
        return "; ".join([report.problem, *of_jobs] if report.problem else of_jobs)

    def _after_s(self, name: str) -> float:
        """When a device without work comes again; spread, so that no herd does."""
        deadlines = [job.deadline_s for job in self.jobs.values()]
        after_s = min([self._idle_comeback_s, *(2 * deadline for deadline in deadlines)])
        return after_s * self._spread(name)

    def _spread(self, name: str) -> float:
        """Within 3/4 and 5/4, always the same for a device."""
        return 0.75 + 0.5 * self._tie(name) / 2**32

    def _tie(self, name: str) -> int:
        return crc32(name.encode(), self._salt)


def _refused(report: DeviceReport) -> int:
    """How many rows it cannot use, by its own word: any number at all."""
    return min(max(report.counters.get("rows_refused", 0), 0), 2**53)


def _kind(work: ProbeWork | EvaluateWork | WalkWork) -> str:
    match work:
        case ProbeWork():
            return "probe"
        case WalkWork():
            return "walk"
        case EvaluateWork():
            return "evaluate"


def _probes(work: ProbeWork | EvaluateWork | WalkWork) -> int:
    match work:
        case ProbeWork():
            return width(work.ranges)
        case WalkWork():
            return work.walk.steps
        case EvaluateWork():
            return 0


def _assigned(job: Job, round: OpenRound, request: RequestWork, offer: Offer, now: float) -> Answer:
    name, opened = request.device, round.opened
    part = round.next_part(name, request.last)
    assigned = WorkAssigned(
        key=UpdateKey(job.name, opened.epoch, opened.round, name, part),
        digest=opened.digest,
        stream_round=opened.stream_round,
        work=offer.work,
        eps=opened.eps,
        batch_rows=opened.batch_rows,
        scope=opened.scope,
        deadline_s=round.remaining_s(now),
        batch_round=opened.batch_round,
    )
    arm, index = job.bandit.arm(name), round.chosen.get(name, job.bandit.index(name))
    decision = DecisionMade(
        job=job.name,
        round=opened.round,
        device=name,
        part=part,
        kind=_kind(offer.work),
        probes=_probes(offer.work),
        reason=offer.reason,
        index=0.0 if index == inf else index,
        mean=arm.mean,
        plays=arm.plays,
    )
    return Answer(assigned, decision)
