"""A large model on a server, steered by two small ones here. A Speaker, for a thread of its own.

While a pass waits for the server, its thread waits: whatever is computed here alone must not be
stepped by the same one. All sequences of a pass are asked for at the same time, and the small
models compute meanwhile. What fails for one sequence ends that sequence alone.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Plan, Schedule, Sequence, Share
from services.proxy_inference.ensemble.counts import Counts
from services.proxy_inference.generation import Generation
from services.proxy_inference.remote.bridge import Bridge
from services.proxy_inference.remote.client import RemoteLarge
from services.proxy_inference.remote.doubt import Doubt
from services.proxy_inference.remote.steering import push
from services.proxy_inference.remote.tail import Told
from services.proxy_inference.running import Answer, Run
from services.proxy_inference.sampling import Sampler
from services.proxy_inference.speaking import Heard, Room, Settled, parted
from shared.errors import EngineError, TransientError

Rows = NDArray[np.float32]
Result = TypeVar("Result")

_MOST_READS = 64
"""Requests of one pass: one for each token of a prompt whose own log-probabilities are wanted."""
_NEVER = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class _Line:
    """One sequence in a pass, and what the small models make of its positions (reads, n_vocab)."""

    share: Share
    base: Rows
    tuned: Rows | None
    """None: it is not steered."""

    @property
    def sequence(self) -> Sequence:
        return self.share.sequence


class RemoteEnsemble:
    """One version over a large model elsewhere; it owns the small generations."""

    def __init__(
        self,
        large: RemoteLarge,
        bridge: Bridge,
        tuned: Generation | None,
        base: Generation,
        counts: Counts,
    ) -> None:
        """Without `tuned` nothing is steered; `base` shapes what the server does not tell."""
        self.room: Room = base.room
        self.limit = min(base.limit, tuned.limit) if tuned else base.limit
        self.most_reads = min(base.most_reads, _MOST_READS)
        self.idle_cells = base.idle_cells
        self.pulls = large.capabilities.pulls
        """Whether there are logits; else tokens come, and no log-probabilities can be told."""
        self._large = large
        self._bridge = bridge
        self._tuned = tuned
        self._base = base
        self._counts = counts
        self._began = 0.0
        self._writing = 0
        """Answers in the present pass, if it has nothing else."""

    @property
    def steers(self) -> bool:
        return self._tuned is not None

    def check(self, prompt: list[int]) -> None:
        """Raises EngineError for a prompt that the server would take for another one."""
        self._large.check(prompt)

    def speak(self, plan: Plan, schedule: Schedule, runs: Mapping[Sequence, Run]) -> list[Heard]:
        self._began = time.perf_counter()
        single = all(share.count == share.reads == 1 for share in plan.shares)
        self._writing = len(plan.shares) if single else 0
        self._counts.passes += any(share.sequence.alpha for share in plan.shares)
        if self.pulls:
            asked = self._bridge.begin(_together([self._told(share) for share in plan.shares]))
            try:
                lines = self._lines(plan)
            except EngineError:
                asked.cancel()
                raise
            told = self._bridge.end(asked)
            return [self._pulled(*one) for one in zip(lines, told, strict=True)]
        lines = self._lines(plan)
        work = [self._drawn(line, runs[line.sequence]) for line in lines]
        drawn = self._bridge.end(self._bridge.begin(_together(work)))
        return [self._pushed(*one) for one in zip(lines, drawn, strict=True)]

    def settle(self, settled: list[Settled]) -> None:
        if self._writing:
            self._counts.seconds += time.perf_counter() - self._began
            self._counts.tokens += sum(not each.heard.error for each in settled)

    def clear(self) -> None:
        for one in self._generations:
            one.clear()

    def close(self) -> None:
        for one in self._generations:
            one.close()

    @property
    def _generations(self) -> list[Generation]:
        return [self._base, self._tuned] if self._tuned else [self._base]

    def _lines(self, plan: Plan) -> list[_Line]:
        """What the small models make of a pass; the base of all of it: it shapes every answer."""
        steered = [share for share in plan.shares if share.sequence.alpha and self._tuned]
        base = parted(plan.shares, self._base.decode(plan))
        tuned: dict[Share, Rows] = {}
        if self._tuned:
            rows = self._tuned.decode(Plan(plan.edits, steered))
            tuned = {heard.share: heard.logits for heard in parted(steered, rows)}
        return [_Line(heard.share, heard.logits, tuned.get(heard.share)) for heard in base]

    async def _told(self, share: Share) -> list[Told]:
        """What the server says of each position that is read."""
        sequence = share.sequence
        end = sequence.fed + share.skip + share.count
        prefixes = [sequence.tokens[: place + 1] for place in range(end - share.reads, end)]
        async with asyncio.TaskGroup() as tasks:
            found = [tasks.create_task(self._large.told(prefix)) for prefix in prefixes]
        return [one.result() for one in found]

    def _pulled(self, line: _Line, told: list[Told] | str) -> Heard:
        if isinstance(told, str):
            return Heard(line.share, line.base[:0], error=told)
        rows = np.empty_like(line.base)
        doubt = _doubt(line.sequence)
        for place, one in enumerate(told):
            filled = self._large.filled(one, line.base[place])
            rows[place] = filled.logits
            doubt.positions += 1
            doubt.k = filled.k
            doubt.missing += filled.missing
            doubt.drifted += filled.drifted
            doubt.unheard += not filled.k
            if line.tuned is not None:
                difference = line.tuned[place] - line.base[place]
                rows[place] += np.float32(line.sequence.alpha) * difference
                if not place and self._counts.watches:
                    large = filled.logits.astype(np.float32)
                    self._counts.watch(rows[place], large, line.tuned[place])
        return Heard(line.share, rows)

    def _drawn(self, line: _Line, run: Run) -> Coroutine[Any, Any, int | None]:
        """What will be the token that the server draws; None: one of those without a name."""
        if not line.share.reads:
            return _nothing()
        can = self._large.capabilities
        if not isinstance(run, Answer) or line.share.reads > 1 or run.marked:
            return _refused(
                f"the large model at {can.url} tells no log-probabilities, which this needs; "
                f"ask with proxy_mode small ({can.without or 'too few'})"
            )
        sampler = run.sampler
        if not can.dialect.serves(sampler.sampling):
            return _refused(
                f"the large model's server at {can.url} knows no top_k and no min_p: leave them out"
            )
        base = line.base[-1]
        tuned = base if line.tuned is None else line.tuned[-1]
        own = _own_bias(sampler)
        alpha = line.sequence.alpha
        sent = push(tuned, base, alpha, most=can.entries, reach=can.reach, also=own)
        doubt = _doubt(line.sequence)
        doubt.positions += 1
        doubt.clipped += sent.clipped
        tokens = list(line.sequence.tokens)
        return self._large.token(tokens, sent.bias, sampler.sampling, seed=sampler.seed())

    def _pushed(self, line: _Line, token: int | str | None) -> Heard:
        """Rows in which nothing but the token that was drawn is possible."""
        if isinstance(token, str):
            return Heard(line.share, line.base[:0], error=token)
        rows = np.full_like(line.base, _NEVER)
        if line.share.reads and token is not None:
            rows[-1, token] = 0.0
        elif line.share.reads:
            small = line.base if line.tuned is None else line.tuned
            heard = self._large.hears(line.sequence.tokens)
            among = self._large.nameless if heard else slice(None)
            rows[-1, among] = small[-1, among]
            _doubt(line.sequence).unheard += 1
        return Heard(line.share, rows)


async def _together(work: list[Coroutine[Any, Any, Result]]) -> list[Result | str]:
    """What all came to, or why not, each for itself."""

    async def one(each: Coroutine[Any, Any, Result]) -> Result | str:
        why = ""
        try:
            return await each
        except* (EngineError, TransientError) as group:
            why = str(group.exceptions[0])
        return why

    async with asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(one(each)) for each in work]
    return [each.result() for each in found]


async def _nothing() -> None:
    """Of a sequence that is still being read."""


async def _refused(why: str) -> None:
    raise EngineError(why)


def _doubt(sequence: Sequence) -> Doubt:
    if sequence.doubt is None:
        sequence.doubt = Doubt()
    return sequence.doubt


def _own_bias(sampler: Sampler) -> dict[int, float]:
    """What a request's bias and its penalties add to each token's logit now."""
    sampling = sampler.sampling
    own = dict(sampling.bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in sampler.written.items():
            drop = sampling.presence_penalty + sampling.frequency_penalty * count
            own[token] = own.get(token, 0.0) - drop
    return own
