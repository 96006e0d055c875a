"""One open round as the scheduler sees it: who is called, what was given out, what came in.

Pure: what it decides follows from its arguments.
"""

from dataclasses import dataclass, field
from math import ceil

from services.scheduler import cost_model
from services.scheduler.cost_model import Paces, Rates
from services.scheduler.dealing import deal, left_out
from services.scheduler.offers import Offer, Selection
from shared.messages import (
    EvaluateWork,
    FoldedUpdate,
    ProbeWork,
    Range,
    RoundOpened,
    UpdateKey,
    WalkWork,
    WorkAssigned,
)
from shared.ranges import width

OPENING, REPLACEMENTS, SECOND = 1, 2, 3
"""Waves of calls: as the round opens; for those called that do not come; at half its deadline."""

GRACE_SHARE = 0.1
"""For this part of the deadline the places of devices that were called are held for them."""
GRACE_S = 3.0
"""But no longer than this."""


@dataclass(slots=True)
class Hand:
    """What one device has been given in one round."""

    part: int = -1
    """The last part that is known."""
    ranges: list[Range] = field(default_factory=list[Range])
    newest: list[Range] = field(default_factory=list[Range])
    """Those of the part that it holds."""
    probing: bool = False
    evaluating: bool = False
    declined: set[str] = field(default_factory=set[str])


class OpenRound:
    """A round from its opening until its report."""

    def __init__(self, opened: RoundOpened, now: float, evaluators_wanted: int) -> None:
        self.opened = opened
        self.opened_at = now
        self.wave = 0
        self.chosen: dict[str, float] = {}
        self.evaluators: set[str] = set()
        self.evaluators_wanted = evaluators_wanted
        self.wanted = ceil(opened.over_selection * opened.enough_devices)
        self.goal = ceil(opened.over_selection * opened.enough_probes)
        self.share = self._share(self.goal, self.wanted)
        """How many probes a device of the mean speed is given at once."""
        self._rates = Rates()
        self.assigned = 0
        """Probes given out and not known to be lost."""
        self.folded = 0
        self.delivered: set[str] = set()
        self.evaluated: set[str] = set()
        self.came: set[str] = set()
        """Those of the chosen who asked for work."""
        self.hands: dict[str, Hand] = {}
        self._pending: dict[str, int] = {}
        self._missing: set[str] = set()
        self._missing_evaluators: set[str] = set()
        self._probing = 0
        self._evaluating = 0
        self._position = 0
        self._left_out = left_out(opened.directions, opened.survivors)

    # ---- evolve

    def selected(self, selection: Selection, paces: Paces) -> None:
        """These devices are called. The second wave writes off what is in the first one's hands."""
        self.wave = selection.wave
        self.chosen.update(selection.probers)
        self.evaluators.update(selection.evaluators)
        self._missing = set(selection.probers)
        self._missing_evaluators = set(selection.evaluators)
        if selection.wave == OPENING:
            self.wanted = selection.wanted
            self.share = self._share(self.goal, self.wanted)
            self._rates = Rates.of(selection.probers, paces)
        elif selection.wave == SECOND:
            self.assigned = self.folded
            self._pending.clear()
            self.share = self._share(self.goal - self.folded, len(selection.probers))
            self._rates = Rates.of(selection.probers, paces)

    def given(self, assigned: WorkAssigned) -> None:
        """A piece of work has gone out."""
        device = assigned.key.device
        hand = self._hand(device)
        hand.part = max(hand.part, assigned.key.part)
        if isinstance(assigned.work, EvaluateWork):
            self._takes_evaluation(device, hand)
            return
        ranges, count = _directions(assigned.work)
        self._takes_probes(device, hand)
        hand.ranges += ranges
        hand.newest = ranges
        self.assigned += count
        self._pending[device] = count
        first, last_count = ranges[-1]
        self._position = (first + last_count) % max(1, self.opened.directions)

    def asked(self, device: str, unit_s: float | None) -> None:
        """The device, which takes `unit_s` a probe if that is known, has come for work."""
        if device in self.chosen:
            self.came.add(device)
            if unit_s is not None:
                self._rates.learn(device, unit_s)

    def returned(self, device: str, *, lost: bool) -> None:
        """The device's hand is free again; `lost`: it never did what it was last given.

        What is lost may be given again, to the same device too: killed in the middle of its work,
        it would keep the round waiting else.
        """
        count = self._pending.pop(device, 0)
        hand = self.hands.get(device)
        if hand is None:
            return
        newest, hand.newest = hand.newest, []
        if not lost:
            return
        self.assigned -= count
        hand.ranges = [each for each in hand.ranges if each not in newest]
        if device not in self.delivered:
            self._probing -= hand.probing
            hand.probing = False
        if device not in self.evaluated:
            self._evaluating -= hand.evaluating
            hand.evaluating = False

    def declined(self, device: str, kind: str) -> None:
        """The device cannot do work of this kind; its place is free."""
        hand = self._hand(device)
        if kind in hand.declined:
            return
        hand.declined.add(kind)
        if kind == "evaluate":
            self._evaluating -= hand.evaluating
        elif device not in self.delivered:
            self._probing -= hand.probing

    def counted(self, row: FoldedUpdate) -> None:
        """An update for this round has been folded; after a restart that is how we learn of it."""
        hand = self._hand(row.device)
        unknown = row.part > hand.part
        hand.part = max(hand.part, row.part)
        if row.kind == "evaluate":
            self._takes_evaluation(row.device, hand)
            self.evaluated.add(row.device)
            return
        self._takes_probes(row.device, hand)
        self.delivered.add(row.device)
        self.folded += row.probes
        if unknown:
            self.assigned += row.probes
        self.assigned = max(self.assigned, self.folded)

    # ---- decide

    def remaining_s(self, now: float) -> float:
        return max(0.0, self.opened_at + self.opened.deadline_s - now)

    def has_called(self, device: str) -> bool:
        return device in self.chosen or device in self.evaluators

    def wave_due(self, now: float) -> int:
        """Which wave of calls should go out now; 0: none."""
        if self.wave == 0:
            return OPENING
        age = now - self.opened_at
        if self.wave < SECOND and age >= self.opened.deadline_s / 2:
            return SECOND
        absent = self._missing or self._missing_evaluators
        return REPLACEMENTS if self.wave == OPENING and absent and age >= self._grace_s else 0

    @property
    def kind(self) -> str:
        """What devices with rows do in it."""
        return "probe" if self.opened.walk is None else "walk"

    @property
    def once(self) -> int | None:
        """How many probes a device's only part comes to; None where it may do many parts."""
        if self.opened.walk is not None:
            return self.opened.walk.steps
        return self.opened.directions if self.opened.how == "exact" else None

    @property
    def least_units(self) -> int:
        """How many units of work the smallest part has: a walk is walked whole."""
        return self.opened.walk.steps if self.opened.walk else 1

    @property
    def pool(self) -> int:
        """How many directions are worth measuring."""
        return width(self.opened.survivors) or self.opened.directions

    @property
    def missing(self) -> int:
        """How many of the last wave's devices have not been given probes."""
        return len(self._missing)

    def next_part(self, device: str, last: UpdateKey | None) -> int:
        """A part that this device was never given, by our own record and by its."""
        hand = self.hands.get(device)
        part = -1 if hand is None else hand.part
        opened = self.opened
        if last is not None and (last.job, last.epoch, last.round, last.device) == (
            opened.job,
            opened.epoch,
            opened.round,
            device,
        ):
            part = max(part, last.part)
        return part + 1

    def evaluation_for(self, device: str, now: float) -> Offer | str:
        """An evaluation, or why there is none for this device."""
        if not (self.opened.evaluate or self.opened.kind == "evaluate"):
            return f"round {self.opened.round} is not evaluated"
        if self.remaining_s(now) <= 0:
            return f"round {self.opened.round} is at its deadline"
        hand = self.hands.get(device)
        if hand and (hand.evaluating or "evaluate" in hand.declined):
            return f"it has had its evaluation of round {self.opened.round}"
        held = len(self._missing_evaluators) if self._holds(now) else 0
        if device not in self.evaluators and self._evaluating + held >= self.evaluators_wanted:
            return f"round {self.opened.round} has enough devices that evaluate"
        return Offer(EvaluateWork(), "a trusted device with held-out rows")

    def probes_for(self, device: str, unit_s: float | None, now: float) -> Offer | str:
        """Directions to measure or to walk, or why there are none for this device."""
        opened = self.opened
        where = f"round {opened.round}"
        hand = self.hands.get(device) or Hand()
        if opened.kind != "tune":
            return f"{where} is an evaluation alone"
        if self.kind in hand.declined:
            return f"it could not do the work of {where}"
        if not hand.probing and device not in self.chosen and not self._has_room(now):
            return f"{where} has enough devices"
        why = self._why(device, hand)
        if self.once is not None:
            return self._all_directions(hand, unit_s, now, why)
        free = self.goal - self.assigned
        if hand.probing and free <= 0:
            return f"{where} has given out as many probes as it needs"
        left = self.remaining_s(now)
        if left <= 0:
            return f"{where} is at its deadline"
        fit = cost_model.fitting(left, unit_s)
        late = unit_s is not None and unit_s > left and device not in self.chosen
        if not fit and (late or left < opened.deadline_s / 2):
            return f"a probe takes it {unit_s or 0:.3g} s and {where} ends in {left:.3g} s"
        # Parts double, lest one that boasts of its speed leave the others nothing but small ones.
        share = max(self._rates.share(self.share, unit_s), width(hand.ranges))
        # No part is more than the round can lose, unless an equal share is.
        share = min(share, max(self.share, self._spare))
        count = min(share, free if hand.probing else share, max(1, fit))
        own = hand.ranges + self._left_out
        ranges = deal(self._position, count, opened.directions, own)
        if not ranges:
            return f"it has measured every direction of {where}"
        pace = "a trial of its speed" if unit_s is None else f"{unit_s:.3g} s each"
        reason = f"{why}; {width(ranges)} probes ({pace}), {left:.3g} s left"
        return Offer(ProbeWork(opened.how, ranges), reason)

    # ---- inside

    def _all_directions(
        self, hand: Hand, unit_s: float | None, now: float, why: str
    ) -> Offer | str:
        opened, left = self.opened, self.remaining_s(now)
        if hand.probing:
            done = "walked" if opened.walk else "measured every direction of"
            return f"it has {done} round {opened.round}"
        needed_s = (unit_s or 0.0) * self.least_units
        if left < opened.deadline_s / 2 and needed_s > left:
            return f"it needs {needed_s:.3g} s and round {opened.round} ends in {left:.3g} s"
        if opened.walk is not None:
            walk = WalkWork(opened.directions, opened.walk)
            return Offer(walk, f"{why}; a walk of {opened.walk.steps} steps, {left:.3g} s left")
        ranges: list[Range] = [(0, opened.directions)]
        return Offer(
            ProbeWork("exact", ranges, opened.local), f"{why}; all directions, {left:.3g} s left"
        )

    def _share(self, probes: int, devices: int) -> int:
        return self.once or max(1, ceil(probes / max(1, devices)))

    def _why(self, device: str, hand: Hand) -> str:
        if hand.probing:
            return f"a further part: {self.goal - self.assigned} probes are not given out"
        if device in self.chosen:
            return f"one of {len(self.chosen)} called, wave {self.wave}"
        return "came while the round has room"

    @property
    def _spare(self) -> int:
        """How many of its probes the round can do without."""
        return self.goal - self.opened.enough_probes

    def _holds(self, now: float) -> bool:
        return self.wave == OPENING and now < self.opened_at + self._grace_s

    @property
    def _grace_s(self) -> float:
        return min(GRACE_S, GRACE_SHARE * self.opened.deadline_s)

    def _has_room(self, now: float) -> bool:
        held = len(self._missing) if self._holds(now) else 0
        return self._probing + held < self.wanted or self.assigned + held * self.share < self.goal

    def _hand(self, device: str) -> Hand:
        return self.hands.setdefault(device, Hand())

    def _takes_probes(self, device: str, hand: Hand) -> None:
        self._probing += not hand.probing
        hand.probing = True
        self._missing.discard(device)

    def _takes_evaluation(self, device: str, hand: Hand) -> None:
        self._evaluating += not hand.evaluating
        hand.evaluating = True
        self._missing_evaluators.discard(device)


def _directions(work: ProbeWork | WalkWork) -> tuple[list[Range], int]:
    """What work is along, and how many probes it comes to."""
    if isinstance(work, WalkWork):
        return [(0, work.directions)], work.walk.steps
    return work.ranges, width(work.ranges)
