"""Which tokens go into the next pass: continuous batching over lanes that share one cache. Pure.

A lane is one sequence number of the cache. It keeps what it holds when its sequence ends, so that
a prompt that begins alike goes on from there. Every running sequence gets its one token first,
prompts share what room the batch has left. When the cache is full, idle lanes are emptied, then the
youngest sequence gives up its lane and comes again: it loses time, never its place in its text.
"""

import math
from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from services.proxy_inference.remote.doubt import Doubt

_IDLE_PASSES = 32
"""Where what is idle costs every pass, so many passes cost about half of reading it again."""


class Sequence:
    """One text that is being read or written.

    `tokens` grows by what is chosen; the first `fed` of them are in the cache. Logits are wanted of
    every position from `read_from` on.
    """

    __slots__ = ("alpha", "doubt", "fed", "lane", "read_from", "reused", "tokens")

    def __init__(
        self, prompt: Tokens[int], *, read_from: int | None = None, alpha: float = 0.0
    ) -> None:
        """`alpha`: how strongly small models steer the large one, where there are any.

        Raises ValueError for an empty prompt: there would be nothing to go on from.
        """
        if not prompt:
            raise ValueError("a sequence needs at least one token")
        self.tokens = list(prompt)
        self.read_from = len(self.tokens) - 1 if read_from is None else read_from
        self.alpha = alpha
        self.fed = 0
        self.reused = 0
        """Tokens of the prompt that were in the cache already."""
        self.lane: Lane | None = None
        self.doubt: Doubt | None = None
        """What of the answer is not exact, where a large model is asked elsewhere."""

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.fed


@dataclass(eq=False, slots=True)
class Lane:
    """One sequence number of the cache, and the tokens that the cache holds for it."""

    number: int
    held: list[int] = field(default_factory=list[int])
    steered: bool = False
    """Whether the small models' caches hold it as well."""
    sequence: Sequence | None = None
    used: int = 0
    """The pass that it was last used in."""


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a pass: `count` tokens, `reads` rows of logits, its last positions."""

    sequence: Sequence
    count: int
    reads: int
    skip: int = 0
    """Of the tokens that are not in the cache, so many were sent by a pass before this one."""


@dataclass(frozen=True, slots=True)
class Forget:
    """The cache drops what it holds for `lane` from position `start` on."""

    lane: int
    start: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `count` positions of lane `source` are also those of `lane`, which is empty."""

    source: int
    lane: int
    count: int


@dataclass(slots=True)
class Plan:
    """One pass: what to do to the cache, in order, and then what to decode."""

    edits: list[Forget | Copy] = field(default_factory=list["Forget | Copy"])
    shares: list[Share] = field(default_factory=list[Share])

    @property
    def size(self) -> int:
        size = 0
        for share in self.shares:
            size += share.count
        return size


class Schedule:
    """Sequences that wait and run, and what the cache holds."""

    def __init__(
        self,
        *,
        lanes: int,
        cells: int,
        batch_tokens: int,
        most_reads: int,
        idle_cells: int | None = None,
    ) -> None:
        """`cells`: tokens in the cache, of them at most `idle_cells` for lanes that nobody uses; if
        those are fewer, they cost every pass, and are not kept for long while others are served. A
        pass has at most `batch_tokens` tokens and reads at most `most_reads` rows, but one row of
        each running sequence always."""
        self.lanes = [Lane(number) for number in range(lanes)]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order they came."""
        self.preempted = 0
        self._cells = cells
        self._idle_cells = cells if idle_cells is None else idle_cells
        self._batch_tokens = batch_tokens
        self._most_reads = max(most_reads, lanes)
        self._pass = 0
        self._held = 0
        """Tokens in all lanes."""
        self._idle_passes = _IDLE_PASSES if self._idle_cells < cells else math.inf
        self._thin_from: float = 0
        """The pass before which no idle lane can have to be emptied."""
        self._owed: list[Forget | Copy] = []
        """What was sent and not kept: the next pass forgets it first."""

    def add(self, sequence: Sequence) -> None:
        """Raises ValueError for a sequence that the whole cache could not hold."""
        if len(sequence.tokens) > self._cells:
            raise ValueError(f"{len(sequence.tokens)} tokens in a cache of {self._cells}")
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """The sequence neither waits nor runs; what the cache holds of it stays for others."""
        if sequence.lane is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        sequence.lane.sequence = None
        sequence.lane = None
        self._thin_from = 0
        self.running.remove(sequence)

    def reset(self) -> None:
        """The cache is empty; what ran comes again, before what waits."""
        for sequence in reversed(list(self.running)):
            self._put_back(sequence)
        for lane in self.lanes:
            lane.held = []
        self._held = 0
        self._owed.clear()

    def next(self) -> Plan:
        """The next pass, without shares if there is nothing to do."""
        self._pass += 1
        plan = Plan()
        self._admit(plan)
        self._thin_out(plan)
        while self.running:
            self._make_room(plan)
            self._share(plan)
            if plan.shares:
                break
            self._preempt(plan)  # prompts alone, and none can go on
        if plan.shares:
            plan.edits[:0], self._owed = self._owed, []
        return plan

    def spare(self, wanted: int, plan: Plan) -> int:
        """How many of `wanted` tokens more, all of them read, the pass has room for."""
        reads = sum(share.reads for share in plan.shares)
        most = min(wanted, self._batch_tokens - plan.size, self._most_reads - reads)
        return max(most + min(self._reach(plan.size + most, plan), 0), 0)

    def done(self, plan: Plan) -> None:
        """The pass has been made: the cache holds what it fed."""
        for share in plan.shares:
            self.fed(share, share.count)

    def fed(self, share: Share, kept: int) -> None:
        """The pass has been made; of what it fed of this sequence the first `kept` tokens stay."""
        sequence, lane = share.sequence, share.sequence.lane
        end = sequence.fed + kept
        if lane is not None:
            lane.held += sequence.tokens[sequence.fed : end]
            self._held += kept
            lane.used = self._pass
            if kept < share.count:
                self._owed.append(Forget(lane.number, end))
        sequence.fed = end
        if share.reads:
            sequence.read_from = end

    def _admit(self, plan: Plan) -> None:
        """Sequences that wait get lanes, in their order, as long as there are lanes and room."""
        while self.waiting:
            idle = [lane for lane in self.lanes if lane.sequence is None]
            if not idle:
                return
            sequence = self.waiting[0]
            busy = sum(len(lane.held) for lane in self.lanes if lane.sequence is not None)
            growth = sum(one.pending for one in self.running)
            if self.running and busy + growth + len(sequence.tokens) > self._cells:
                return
            self.waiting.popleft()
            self._settle(sequence, idle, plan)

    def _settle(self, sequence: Sequence, idle: list[Lane], plan: Plan) -> None:
        """Give the sequence a lane, with what any lane holds of its beginning."""
        steered = sequence.alpha != 0.0
        prefix = {
            lane.number: min(common(lane.held, sequence.tokens), sequence.read_from)
            if lane.steered == steered
            else 0
            for lane in self.lanes
        }
        best = max(self.lanes, key=lambda lane: (prefix[lane.number], lane.sequence is None))
        count = prefix[best.number]
        mine = best
        if best.sequence is not None or 2 * count < len(best.held) or not count:
            mine = min(idle, key=lambda lane: (bool(lane.held), lane.used))
        if mine is best:
            if count < len(mine.held):
                plan.edits.append(Forget(mine.number, count))
                self._held -= len(mine.held) - count
                del mine.held[count:]
        else:
            self._empty(mine, plan)
            if count and self._held + count <= self._cells:
                plan.edits.append(Copy(best.number, mine.number, count))
                mine.held = best.held[:count]
                self._held += count
        mine.sequence, mine.used, mine.steered = sequence, self._pass, steered
        sequence.lane, sequence.fed = mine, len(mine.held)
        sequence.reused = max(sequence.reused, sequence.fed)
        self.running.append(sequence)

    def _thin_out(self, plan: Plan) -> None:
        """Idle lanes hold no more than they may, no longer; who was used last stays longest."""
        if self._pass < self._thin_from:
            return
        self._thin_from = math.inf
        idle = [lane for lane in self.lanes if lane.sequence is None and lane.held]
        kept = 0
        for lane in sorted(idle, key=lambda lane: -lane.used):
            kept += len(lane.held)
            until = lane.used + self._idle_passes
            if kept > self._idle_cells or self._pass > until:
                self._empty(lane, plan)
            else:
                self._thin_from = min(self._thin_from, until + 1)

    def _make_room(self, plan: Plan) -> None:
        """Every sequence that needs but one token has room for it."""
        while self._reach(sum(one.pending == 1 for one in self.running), plan) < 0:
            self._preempt(plan)

    def _share(self, plan: Plan) -> None:
        single = [one for one in self.running if one.pending == 1]
        prompts = [one for one in self.running if one.pending > 1]
        plan.shares += [Share(one, 1, 1) for one in single[: self._batch_tokens]]
        left = self._batch_tokens - len(plan.shares)
        reads = self._most_reads - len(plan.shares)
        for sequence in prompts:
            count = min(sequence.pending, left)
            shortage = self._reach(plan.size + count, plan)
            count += min(shortage, 0)
            read = max(sequence.fed + count - sequence.read_from, 0)
            if read > reads:
                count -= read - reads
                read = reads
            if count <= 0:
                continue
            plan.shares.append(Share(sequence, count, read))
            left -= count
            reads -= read

    def _reach(self, wanted: int, plan: Plan) -> int:
        """Free cells beyond `wanted`, after emptying idle lanes as needed; negative: too few."""
        while True:
            free = self._cells - self._held - wanted
            if free >= 0:
                return free
            idle = [lane for lane in self.lanes if lane.sequence is None and lane.held]
            if not idle:
                return free
            self._empty(min(idle, key=lambda lane: lane.used), plan)

    def _empty(self, lane: Lane, plan: Plan) -> None:
        if lane.held:
            plan.edits.append(Forget(lane.number, 0))
            self._held -= len(lane.held)
            lane.held = []

    def _preempt(self, plan: Plan) -> None:
        """The youngest sequence gives up its lane and waits, before all others."""
        youngest = self.running[-1]
        lane = youngest.lane
        self._put_back(youngest)
        if lane is not None:
            self._empty(lane, plan)
        self.preempted += 1

    def _put_back(self, sequence: Sequence) -> None:
        if sequence.lane is not None:
            sequence.lane.sequence = None
            self._thin_from = 0
        sequence.lane, sequence.fed = None, 0
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)


def common(held: list[int], tokens: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(held), len(tokens))
    if held[:high] == tokens[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if held[low:middle] == tokens[low:middle]:
            low = middle
        else:
            high = middle
    return low
