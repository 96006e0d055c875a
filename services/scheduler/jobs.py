"""One job as the scheduler sees it: what its devices are worth, and whom its rounds call.

Pure: what it decides follows from its arguments.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, islice
from math import ceil, inf

from services.scheduler import cost_model
from services.scheduler.bandit import Bandit
from services.scheduler.cost_model import Paces
from services.scheduler.devices import Device, evaluates
from services.scheduler.offers import Offer, Selection
from services.scheduler.rewards import Rewards
from services.scheduler.rounds import OPENING, REPLACEMENTS, OpenRound
from shared.messages import (
    AdapterEvaluated,
    DeviceReport,
    EpochOpened,
    JobOpened,
    ModelPublished,
    RoundClosed,
    RoundOpened,
    RoundReport,
    UpdatesFolded,
)

JobFact = (
    EpochOpened
    | RoundOpened
    | RoundClosed
    | AdapterEvaluated
    | ModelPublished
    | UpdatesFolded
    | RoundReport
    | Selection
)

REMEMBERED_ROUNDS = 4
"""Closed rounds whose report may still come."""
RECENT_REPORTS = 8
"""Who contributed to one of these is called after a restart, before it has reported."""


class Job:
    """A job from its opening to its end."""

    def __init__(self, opened: JobOpened) -> None:
        self.name = opened.job
        self.spec = opened.spec
        self.bandit = Bandit()
        self.paces = Paces()
        self.open: OpenRound | None = None
        self._allowed = frozenset(opened.spec.allow_devices)
        self._judges = frozenset(opened.spec.evaluation.allow_devices)
        self._closed: dict[int, OpenRound] = {}
        self._rewards = Rewards()
        self._recent: deque[list[str]] = deque(maxlen=RECENT_REPORTS)

    # ---- evolve

    def evolve(self, fact: JobFact, now: float) -> None:
        """Apply one fact of this job."""
        match fact:
            case RoundOpened():
                self._opened(fact, now)
            case RoundClosed():
                self._close()
            case UpdatesFolded():
                self._folded(fact)
            case RoundReport():
                self._reported(fact)
            case Selection():
                if self.open is not None and self.open.opened.round == fact.round:
                    self.open.selected(fact, self.paces)
            case _:
                pass

    def _opened(self, event: RoundOpened, now: float) -> None:
        enough = event.over_selection * self.spec.evaluation.enough_devices
        wanted = ceil(enough) if event.evaluate or event.kind == "evaluate" else 0
        self.open = OpenRound(event, now, wanted)

    def _close(self) -> None:
        if self.open is not None:
            if self.open.opened.kind == "tune":
                self.paces.fade(self._late(self.open) - self.open.chosen.keys())
            self._closed[self.open.opened.round] = self.open
            for number in sorted(self._closed)[:-REMEMBERED_ROUNDS]:
                del self._closed[number]
        self.open = None

    def _folded(self, event: UpdatesFolded) -> None:
        """Learn how fast devices are, and what the open round has."""
        for row in event.updates:
            if row.kind == "probe" and row.probes:
                units = 1 if self._exact else row.probes
                self.paces.seen(row.device, row.work_s / units)
            if self.open is not None and row.round == self.open.opened.round:
                self.open.counted(row)

    def _reported(self, event: RoundReport) -> None:
        """Reward who contributed; who was called and did not is a play that earned nothing."""
        self.bandit.advance()
        rewards = self._rewards.of(event.contributions)
        closed = self._closed.pop(event.round, None)
        if closed is not None:
            turned_away = {name for name in closed.came if not _was_probing(closed, name)}
            for name in closed.chosen.keys() - rewards.keys() - turned_away:
                rewards[name] = 0.0
        for name, reward in rewards.items():
            self.bandit.play(name, reward)
        self._recent.append([each.device for each in event.contributions])

    def speeds(self, report: DeviceReport) -> None:
        """Take over what a device says of its speed."""
        for speed in report.speeds:
            if speed.job == self.name:
                unit_s = speed.exact_s if self._exact else speed.probe_s
                self.paces.told(report.device, unit_s)

    # ---- decide

    @property
    def deadline_s(self) -> float:
        opened = self.open
        return self.spec.pacing.deadline_s if opened is None else opened.opened.deadline_s

    def refusal(self, report: DeviceReport) -> str:
        """Why this device cannot work for the job; empty if it can."""
        if report.problem:
            return f"the device has a problem: {report.problem}"
        if why := report.unable.get(self.name):
            return f"the device cannot help with job {self.name}: {why}"
        if self._allowed and report.device not in self._allowed:
            return f"job {self.name} does not allow this device"
        if not (report.rows or self._evaluates(report)):
            return f"the device has no rows for job {self.name}"
        return ""

    def _evaluates(self, report: DeviceReport) -> bool:
        """Whether it may be asked to measure held-out rows for this job."""
        return evaluates(report) and (not self._judges or report.device in self._judges)

    def offer(
        self, opened: OpenRound, report: DeviceReport, kinds: Collection[str], now: float
    ) -> Offer | str:
        """Work for this device in the open round, or why there is none."""
        if reason := self.refusal(report):
            return reason
        reason = f"round {opened.opened.round} has no work of a kind that the device knows"
        if "evaluate" in kinds and self._evaluates(report):
            offer = opened.evaluation_for(report.device, now)
            if isinstance(offer, Offer):
                return offer
            reason = offer
        if opened.kind in kinds and report.rows:
            return opened.probes_for(report.device, self.paces.get(report.device), now)
        return reason

    def select(
        self, devices: Collection[Device], live_after: float, now: float, tie: Callable[[str], int]
    ) -> Selection | None:
        """Whom the open round should call now; None if nothing is due."""
        opened = self.open
        if opened is None or not (wave := opened.wave_due(now)):
            return None
        live = [each for each in devices if each.seen >= live_after and each.present(now)]
        probers, wanted = dict[str, float](), 0
        if opened.opened.kind == "tune" and wave == OPENING:
            able = {each.name for each in live if self._probes(each, opened)}
            able |= self._unreported(devices)
            late = self._late(opened) & able
            ranked = self.bandit.ranked(able - late, tie)
            probers, wanted = self._best(opened, ranked, self.bandit.ranked(late, tie))
        elif opened.opened.kind == "tune":
            idle = {each.name for each in live if self._probes(each, opened)}
            idle -= {each.name for each in live if each.works(now)}
            if wave == REPLACEMENTS:
                idle -= opened.chosen.keys()
            # Those who have done a part already are asked last, if they can add anything.
            ranked = self.bandit.ranked(idle - opened.hands.keys(), tie)
            if opened.once is None:
                ranked = chain(ranked, self.bandit.ranked(idle & opened.hands.keys(), tie))
            lacking = max(1, opened.wanted - len(opened.delivered))
            probers = dict(islice(ranked, opened.missing if wave == REPLACEMENTS else lacking))
        evaluators = self._evaluators(opened, live, wave)
        return Selection(self.name, opened.opened.round, wave, probers, evaluators, wanted)

    # ---- inside

    @property
    def _exact(self) -> bool:
        return self.spec.tuning.how == "exact"

    def _late(self, opened: OpenRound) -> set[str]:
        """Who finishes not even the smallest part in time."""
        return self.paces.slower_than(opened.opened.deadline_s / opened.least_units)

    def _probes(self, device: Device, opened: OpenRound) -> bool:
        report = device.report
        if report is None or not report.rows or not device.does(opened.kind):
            return False
        return not self.refusal(report)

    def _unreported(self, devices: Iterable[Device]) -> set[str]:
        """Who did work lately but is unknown: the scheduler was restarted, the device was not."""
        if not self._recent:
            return set()
        recent = {name for names in self._recent for name in names}
        return recent - {each.name for each in devices}

    def _best(
        self,
        opened: OpenRound,
        ranked: Iterator[tuple[str, float]],
        late: Iterator[tuple[str, float]],
    ) -> tuple[dict[str, float], int]:
        """The first devices that deliver what the round needs, over-selection included.

        More of them, as long as each has probes that are worth its while; the `late`, which finish
        nothing in time, only if the others are too few. And how many these should be; there may be
        fewer.
        """
        needed = opened.opened
        best: dict[str, float] = {}
        probes = 0
        while len(best) < needed.enough_devices or probes < needed.enough_probes:
            name, index = next(ranked, None) or next(late, ("", 0.0))
            if not name:
                break
            best[name] = index
            probes += self._capacity(opened, name)
        wanted = ceil(needed.over_selection * max(len(best), needed.enough_devices))
        most = 0 if opened.once is not None else opened.goal // cost_model.WORTHWHILE_PROBES
        best.update(islice(ranked, max(wanted, most, len(best)) - len(best)))
        return best, max(wanted, len(best))

    def _capacity(self, opened: OpenRound, name: str) -> int:
        if opened.once is not None:
            return opened.once
        fit = cost_model.fitting(opened.opened.deadline_s, self.paces.get(name))
        return min(opened.pool, max(1, fit))

    def _evaluators(self, opened: OpenRound, live: Iterable[Device], wave: int) -> tuple[str, ...]:
        """Trusted devices that are not asked yet, the fastest first."""
        lacking = opened.evaluators_wanted - (len(opened.evaluated) if wave > 1 else 0)
        enough = len(opened.evaluated) >= self.spec.evaluation.enough_devices
        if lacking <= 0 or enough:
            return ()
        fast = sorted(
            (self._evaluate_s(each.report), each.name)
            for each in live
            if each.report is not None
            and each.name not in opened.evaluators
            and self._evaluates(each.report)
            and not self.refusal(each.report)
        )
        return tuple(name for _, name in fast[:lacking])

    def _evaluate_s(self, report: DeviceReport) -> float:
        known = (speed.evaluate_s for speed in report.speeds if speed.job == self.name)
        return next((seconds for seconds in known if seconds > 0), inf)


def _was_probing(closed: OpenRound, name: str) -> bool:
    hand = closed.hands.get(name)
    return hand is not None and hand.probing
