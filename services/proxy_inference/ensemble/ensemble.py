"""The large model, the tuned small one and its base, stepped as one (proxy-tuning, FedPT).

All three caches hold the same tokens in the same lanes; lanes whose sequence is not steered are
in the large model's alone. The tuned model drafts while that pays, the other two read the drafts in
one pass each, and what is not taken is cut from all three caches before the next pass.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Forget, Plan, Schedule, Sequence, Share
from services.proxy_inference.ensemble.combining import steer
from services.proxy_inference.ensemble.costs import Curve, Curves
from services.proxy_inference.ensemble.counts import Counts
from services.proxy_inference.ensemble.drafting import (
    MOST_DRAFTS,
    Acceptance,
    Prices,
    Rate,
    least,
)
from services.proxy_inference.generation import Generation
from services.proxy_inference.running import Run
from services.proxy_inference.sampling import Draft, Drafter
from services.proxy_inference.speaking import Heard, Room, Settled, parted
from shared.errors import EngineError

Rows = NDArray[np.float32]

_SIZES = (1, 2, 4, 8, 16, 3, 32, 6, 5, 12, 24, 48, 10)
"""Of the passes that are timed before anyone is served, as far as the time lets it."""
_LEAST_SIZES = 3
_TRIALS = 6
_TRIALS_S = 1.5
_TRY_EVERY = 64
"""Every so many passes something is drafted that does not seem to pay: costs may have changed."""
_TRIED = 3
_PRICED = 8
"""Every so many passes it is asked anew what pays."""
_RECENT = 0.05
_AHEAD = 3
"""So many drafts more are looked at, to see whether the next one is worth its price."""
_SOME = 4
"""Of the sequences in a pass, about one in so many is sure enough to draft."""


@dataclass(eq=False, slots=True)
class _Line:
    """One steered sequence in a pass."""

    share: Share
    most: int = 0
    drafter: Drafter | None = None
    rows: list[Rows] = field(default_factory=list[Rows])
    """Of the tuned model, by its passes."""
    drafts: list[Draft] = field(default_factory=list[Draft])
    dropped: Draft | None = None
    chance: float = 1.0
    """That all drafts are taken."""


class _Timed:
    """A model with its cost curve; of its logits those of the first `tokens` tokens.

    A pass of another length than the last costs more: llama.cpp makes its graph anew.
    """

    def __init__(self, generation: Generation, curve: Curve, tokens: int) -> None:
        self.generation = generation
        self.curve = curve
        self._tokens = tokens
        self.length = 0
        """Of the last pass."""
        self._anew = 0.0
        """Seconds more."""

    def decode(self, plan: Plan) -> Rows:
        began = time.perf_counter()
        rows = self.generation.decode(plan)
        seconds, size = time.perf_counter() - began, plan.size
        if size:
            length = self.generation.filled(size)
            if length == self.length:
                self.curve.measured(size, seconds)
            else:
                more = seconds - self.curve.seconds(size)
                self._anew += _RECENT * (max(more, 0.0) - self._anew)
            self.length = length
        return rows[:, : self._tokens]

    def seconds(self, size: int) -> float:
        """What a pass of `size` tokens would take now."""
        again = self.generation.filled(size) == self.length
        return self.curve.seconds(size) + (0.0 if again else self._anew)


def _try(models: list[_Timed]) -> None:
    """The curves' trials. The models take turns, as in service: each finds the processor's caches
    full of another's weights."""
    began = time.perf_counter()
    lanes = [int(model.generation.occupy()) for model in models]
    sizes = [size for size in _SIZES if size <= min(m.generation.room.cells for m in models) // 2]
    for turn in range(_TRIALS):
        for number, size in enumerate(sizes):
            if time.perf_counter() - began > _TRIALS_S and (turn or number >= _LEAST_SIZES):
                break
            for model, lane in zip(models, lanes, strict=True):
                plan = model.generation.trial(size, lane)
                start = time.perf_counter()
                model.generation.decode(plan)
                model.curve.tried(size, time.perf_counter() - start)
                model.generation.decode(Plan([Forget(lane, 0)]))
    for model in models:
        model.generation.clear()


class Ensemble:
    """One version over the large model; it owns the three generations."""

    def __init__(
        self,
        large: Generation,
        tuned: Generation | None,
        base: Generation | None,
        counts: Counts,
        curves: Curves,
        *,
        tokens: int,
        speculates: bool,
    ) -> None:
        """Without small models nothing is steered. What `curves` do not know yet is tried.

        `tokens`: so many all models know; what pads one beyond that is neither read nor written.
        """
        self.room: Room = large.room
        self.limit = min(one.limit for one in (large, tuned, base) if one is not None)
        self.most_reads = large.most_reads
        self.idle_cells = min(one.idle_cells for one in (large, tuned, base) if one is not None)
        self._tokens = tokens
        self._large = _Timed(large, curves.large, tokens)
        self._tuned = _Timed(tuned, curves.tuned, tokens) if tuned else None
        self._base = _Timed(base, curves.base, tokens) if base else None
        models = [one for one in (self._large, self._tuned, self._base) if one]
        if not all(model.curve.known for model in models):
            _try(models)
        self._counts = counts
        self._speculates = speculates
        self._acceptance = {True: Acceptance(), False: Acceptance()}
        """Of answers that take the likeliest token, and of others."""
        self._rate = Rate()
        self._drafting = 0
        """Passes in which something might be drafted."""
        self._worth: dict[tuple[int, int, bool, int, int], float] = {}
        """What `_least` found."""
        self._began = 0.0
        self._lines: dict[Sequence, _Line] = {}
        self._only_writing = False
        """Whether the present pass has nobody's prompt in it: what it costs is its tokens'."""

    @property
    def steers(self) -> bool:
        return self._tuned is not None

    def check(self, prompt: list[int]) -> None:
        """Raises EngineError for a prompt with a token that some of the models do not know."""
        if max(prompt) >= self._tokens:
            raise EngineError(
                f"prompt: {max(prompt)} is no token of both the large model and the small one; "
                f"they share 0 to {self._tokens - 1}"
            )

    def speak(self, plan: Plan, schedule: Schedule, runs: Mapping[Sequence, Run]) -> list[Heard]:
        self._began = time.perf_counter()
        self._lines = {}
        tuned, base = self._tuned, self._base
        steered = [share for share in plan.shares if share.sequence.alpha]
        if not steered or tuned is None or base is None:
            for small in filter(None, (tuned, base)):
                small.generation.decode(Plan(plan.edits))
            return parted(plan.shares, self._large.decode(plan))
        lines = self._admitted(steered, plan, schedule, runs)
        self._lines = {line.share.sequence: line for line in lines}
        self._only_writing = all(line.drafter for line in lines) and steered == plan.shares
        rows = tuned.decode(Plan(plan.edits, steered))
        for line, heard in zip(lines, parted(steered, rows), strict=True):
            line.rows.append(heard.logits.copy())
        try:
            self._draft(tuned, plan.size, lines)
            verified = {line.share: _with_drafts(line) for line in lines}
            shares = [verified.get(share, share) for share in plan.shares]
            large = parted(shares, self._large.decode(Plan(plan.edits, shares)))
            small = base.decode(Plan(plan.edits, [verified[share] for share in steered]))
        finally:
            for line in lines:
                if line.drafts:
                    del line.share.sequence.tokens[-len(line.drafts) :]
        return self._steered(large, small)

    def settle(self, settled: list[Settled]) -> None:
        written = 0
        for each in settled:
            line = self._lines.get(each.heard.share.sequence)
            if line is None or line.drafter is None:
                continue
            written += each.taken + 1
            acceptance = self._acceptance[line.drafter.sampler.greedy]
            for place, draft in enumerate(line.drafts):
                if place > each.taken or (place == each.taken and each.ended):
                    break
                self._counts.drafted[place] += 1
                self._counts.taken[place] += place < each.taken
                acceptance.learn(draft.sure, float(place < each.taken))
            self._counts.rollbacks += each.taken < len(line.drafts)
        if written and self._only_writing:
            seconds = time.perf_counter() - self._began
            self._rate.passed(seconds, written)
            self._counts.seconds += seconds
            self._counts.tokens += written

    def clear(self) -> None:
        for one in self._generations:
            one.clear()

    def close(self) -> None:
        for one in self._generations:
            one.close()

    @property
    def _generations(self) -> list[Generation]:
        return [one.generation for one in (self._large, self._tuned, self._base) if one]

    def _admitted(
        self, steered: list[Share], plan: Plan, schedule: Schedule, runs: Mapping[Sequence, Run]
    ) -> list[_Line]:
        """A line for each steered sequence; those that write have somebody to draft for them."""
        lines = [_Line(share) for share in steered]
        writing = [line for line in lines if line.share.count == line.share.reads == 1]
        for line in writing:
            run = runs[line.share.sequence]
            line.drafter = run.drafter()
            line.most = min(MOST_DRAFTS, run.left - 1)
        wanted = sum(max(line.most, 0) for line in writing)
        spare = schedule.spare(wanted, plan) if self._speculates and wanted else 0
        for line in writing:
            line.most = max(min(line.most, spare // len(writing)), 0)
        return lines

    def _draft(self, tuned: _Timed, size: int, lines: list[_Line]) -> None:
        """The tuned model writes ahead, each sequence as far as it pays."""
        active = [line for line in lines if line.drafter is not None and line.most]
        if not active:
            return
        turn = self._drafting = self._drafting + 1
        tried = 0 if turn % _TRY_EVERY else 1 + turn // _TRY_EVERY % _TRIED
        if not turn % _PRICED:
            self._worth.clear()
        for ahead in range(MOST_DRAFTS):
            active = self._drafted(active, size, sure=ahead < tried)
            if not active:
                return
            size += len(active)
            shares = [Share(line.share.sequence, 1, 1, skip=len(line.drafts)) for line in active]
            rows = tuned.decode(Plan([], shares)).copy()
            for place, line in enumerate(active):
                line.rows.append(rows[place : place + 1])

    def _drafted(self, active: list[_Line], size: int, *, sure: bool) -> list[_Line]:
        """The lines that have a draft more; `sure`: of some of them, whether it pays or not.

        The likeliest come first: each draft makes the pass of `size` tokens dearer for the next.
        """
        writing = len(active)
        proposed: list[tuple[float, _Line, Draft]] = []
        for line in active:
            draft = self._proposed(line, self._least(line, size, writing), sure=sure)
            if draft is not None:
                chance = self._acceptance[_greedy(line)].chance(draft.sure)
                proposed.append((line.chance * chance, line, draft))
        proposed.sort(key=itemgetter(0), reverse=True)
        drafted: list[_Line] = []
        for chance, line, draft in proposed:
            tried = sure and _SOME * len(drafted) < writing
            if not tried and chance <= self._least(line, size + len(drafted), writing):
                line.dropped = draft
                continue
            line.chance = chance
            line.drafts.append(draft)
            line.share.sequence.tokens.append(draft.token)
            drafted.append(line)
        return drafted

    def _proposed(self, line: _Line, enough: float, *, sure: bool) -> Draft | None:
        """The line's next draft, unless none can have a chance of being taken above `enough`."""
        row = line.rows[-1][-1]
        if line.drafter is None or len(line.drafts) >= line.most:
            return None
        if line.chance <= enough and not sure:
            return None
        if not math.isfinite(row[row.argmax()]):  # a NaN is the largest
            return None
        return line.drafter.propose(row)

    def _least(self, line: _Line, size: int, writing: int) -> float:
        """A chance above which a draft pays: as it was a few passes ago, it changes slowly."""
        base, greedy = self._base, _greedy(line)
        assert base is not None
        key = size, writing, greedy, self._large.length, base.length
        found = self._worth.get(key)
        if found is None:
            later = self._acceptance[greedy].mean
            found = self._worth[key] = least(later, self._prices(size, writing))
        return found

    def _prices(self, size: int, writing: int) -> Prices:
        """Of the next drafts of one of `writing` sequences, of which some will draft as much."""
        assert self._tuned is not None
        assert self._base is not None
        some = -(-writing // _SOME)
        ahead = self._tuned.curve.seconds(some) / some
        large, base = self._large, self._base
        sizes = [size + j * some for j in range(_AHEAD + 1)]
        verified = [(large.seconds(one) + base.seconds(one)) / some for one in sizes]
        drafts = [cost + j * ahead for j, cost in enumerate(verified)]
        token = (verified[0] * some + self._tuned.curve.seconds(writing)) / writing
        return Prices(drafts, self._rate.token or token)

    def _steered(self, large: list[Heard], base: Rows) -> list[Heard]:
        self._counts.passes += 1
        watched = self._counts.watches
        found: list[Heard] = []
        at = 0
        for heard in large:
            line = self._lines.get(heard.share.sequence)
            if line is None:
                found.append(heard)
                continue
            tuned = np.concatenate(line.rows) if len(line.rows) > 1 else line.rows[0]
            reads = heard.share.reads
            if reads:
                alone = heard.logits[0].copy() if watched else None
                steer(heard.logits, tuned, base[at : at + reads], line.share.sequence.alpha)
                at += reads
                if alone is not None:
                    self._counts.watch(heard.logits[0], alone, tuned[0])
                    watched = False
                self._learn_dropped(line, heard.logits[-1])
            found.append(Heard(heard.share, heard.logits, tuple(line.drafts)))
        return found

    def _learn_dropped(self, line: _Line, logits: Rows) -> None:
        """What was not sent teaches as well: that drafting pays again would never be noticed."""
        if line.dropped is not None and line.drafter is not None and np.isfinite(logits.max()):
            sampler = line.drafter.sampler
            taken = sampler.chance(logits, line.dropped)
            self._acceptance[sampler.greedy].learn(line.dropped.sure, taken)


def _greedy(line: _Line) -> bool:
    return line.drafter is not None and line.drafter.sampler.greedy


def _with_drafts(line: _Line) -> Share:
    more = len(line.drafts)
    return Share(line.share.sequence, line.share.count + more, line.share.reads + more)
