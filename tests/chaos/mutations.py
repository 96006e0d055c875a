"""What the verifiers must find: each mutation breaks one promise of the code under test."""

# A mutation is made from inside.
# pyright: reportPrivateUsage=false

from collections.abc import Callable
from typing import Any

import pytest

from edge_client.ledger import Ledger
from edge_client.outbox import Outbox
from edge_client.spool import Spool
from services.aggregator.folding import Folding
from services.aggregator.pooling import Batch
from services.aggregator.service import Aggregator
from services.aggregator.snapshots import Snapshots
from services.aggregator.standing import Standing
from services.aggregator.state import JobState
from services.aggregator.store import Store
from shared.heldout import HeldOut
from shared.log_writer import LogWriter
from shared.messages import LogEvent, ProbeResult

Patch = Callable[[pytest.MonkeyPatch], None]


def forgets_keys(patch: pytest.MonkeyPatch) -> None:
    evolve = JobState._evolve_folded

    def forgetful(self: JobState, event: Any, sequence: int) -> None:
        evolve(self, event, sequence)
        for record in self.rounds.values():
            record.seen.clear()

    patch.setattr(JobState, "_evolve_folded", forgetful)


def folds_twice(patch: pytest.MonkeyPatch) -> None:
    add = Batch.add

    def twice(self: Batch, result: ProbeResult, half: int) -> None:
        add(self, result, half)
        add(self, result, half)

    patch.setattr(Batch, "add", twice)


def skips_a_late_term(patch: pytest.MonkeyPatch) -> None:
    commit = JobState._commit

    def skipping(self: JobState, closing: Any) -> Any:
        self.progress.late = self.progress.late[1:]
        return commit(self, closing)

    patch.setattr(JobState, "_commit", skipping)


def forgets_its_latecomers_weight(patch: pytest.MonkeyPatch) -> None:
    take = Folding.take

    def forgetful(self: Folding, update: Any) -> Any:
        for record in self._rounds.values():
            record.late_weight = 0
        return take(self, update)

    patch.setattr(Folding, "take", forgetful)


def loses_a_spool_file(patch: pytest.MonkeyPatch) -> None:
    take_up = Spool._take_up

    def careless(self: Spool) -> None:
        take_up(self)
        for key in self.keys[:1]:
            self._remove(key)

    patch.setattr(Spool, "_take_up", careless)


def sends_before_it_is_on_disk(patch: pytest.MonkeyPatch) -> None:
    def hasty(self: Spool, key: str, data: bytes) -> None:
        self._disk.write(key + ".update", data)

    patch.setattr(Spool, "_write", hasty)


def removes_before_its_line_is_on_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "sync", lambda self: None)  # type: ignore[misc]


def settles_before_it_is_logged(patch: pytest.MonkeyPatch) -> None:
    async def hasty(self: Aggregator, name: str, updates: Any) -> None:
        job = self.jobs[name]
        async with self._turn:
            event, outcomes = job.decide_updates(updates)
            await self._settle(updates, outcomes)
            if event is not None:
                await self._detail_commit(job, event)
            await self._go_on(job)

    patch.setattr(Aggregator, "_fold_job", hasty)


def waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    async def patient(self: Aggregator, job: JobState, opened: Any) -> None:
        """Nothing is ever overdue."""

    patch.setattr(Aggregator, "_overdue", patient)


def never_sends_again(patch: pytest.MonkeyPatch) -> None:
    async def idle(self: Outbox) -> None:
        """What was sent once was sent."""

    patch.setattr(Outbox, "resending", idle)


def claims_nothing(patch: pytest.MonkeyPatch) -> None:
    async def unclaimed(self: LogWriter) -> None:
        """As if the expected sequence alone fenced two streams off together."""

    patch.setattr(LogWriter, "claim", unclaimed)


def begins_an_epoch_at_zero(patch: pytest.MonkeyPatch) -> None:
    def empty_handed(self: Standing, data: bytes) -> None:
        """The start is taken for granted, and never looked into."""
        self.start = None

    patch.setattr(Standing, "begin", empty_handed)


def brings_no_start_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    async def idle(self: Store, job: JobState, *, anew: bool = False) -> None:
        """What the log has is all there is."""

    patch.setattr(Store, "bring", idle)


def removes_what_an_epoch_began_with(patch: pytest.MonkeyPatch) -> None:
    see = Snapshots.see

    def alike(self: Snapshots, event: LogEvent) -> None:
        """As if a start were a version like any other."""
        see(self, event)
        self.listed += self._begun_with
        self._begun_with = []

    patch.setattr(Snapshots, "see", alike)


def removes_the_best(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HeldOut, "ranked", lambda self: [])  # type: ignore[misc]


def counts_what_an_epoch_left_behind(patch: pytest.MonkeyPatch) -> None:
    evolve = JobState._evolve_epoch
    record = Folding._record

    def nostalgic(self: JobState, event: Any, sequence: int) -> None:
        rounds = self.rounds
        evolve(self, event, sequence)
        self.rounds = rounds

    def generous(self: Folding, update: Any) -> Any:
        self._epoch, own = min(self._epoch, update.key.epoch), self._epoch
        try:
            return record(self, update)
        finally:
            self._epoch = own

    patch.setattr(JobState, "_evolve_epoch", nostalgic)
    patch.setattr(Folding, "_record", generous)
