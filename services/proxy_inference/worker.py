"""The one thread that steps llama.cpp: every speaker with work, one pass each, in turn.

The event loop hands it tickets and takes their pieces; nothing else crosses over.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from services.proxy_inference.batching import Schedule, Sequence, Share
from services.proxy_inference.running import Piece, Run
from services.proxy_inference.speaking import BATCH_TOKENS, Heard, Settled, Speaker
from shared.errors import EngineError
from shared.logs import get

log = get("worker")

_COLLECTED_S = 0.01
"""What became visible is handed over so much later at most, together: waking the loop for every
token took a tenth of a small model's pass, and its work then stands in this thread's way."""


@dataclass(eq=False)
class Ticket:
    """One sequence on its way, and where its pieces go: one more than it has tokens, at most."""

    run: Run
    index: int
    pieces: asyncio.Queue[tuple[int, Piece]]
    told: bool = False
    """Whether anything was."""


@dataclass(eq=False)
class _Desk:
    speaker: Speaker
    schedule: Schedule
    tickets: dict[Sequence, Ticket] = field(default_factory=dict[Sequence, Ticket])


@dataclass
class Counts:
    """What the thread has done, read by others at any time."""

    running: int = 0
    waiting: int = 0
    passes: int = 0
    tokens: int = 0
    preempted: int = 0
    failed_passes: int = 0
    not_finite: int = 0


def total(counts: Iterable[Counts]) -> Counts:
    """What several threads have done together."""
    found = Counts()
    for one in counts:
        found.running += one.running
        found.waiting += one.waiting
        found.passes += one.passes
        found.tokens += one.tokens
        found.preempted += one.preempted
        found.failed_passes += one.failed_passes
        found.not_finite += one.not_finite
    return found


class Worker:
    """Steps speakers until it is stopped."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the thread has ended; failed if a bug ended it."""
        self._loop = asyncio.get_running_loop()
        self._desks: dict[Speaker, _Desk] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._some = threading.Condition()
        self._stopping = False
        self._told: deque[tuple[Ticket, Piece]] = deque()
        self._collected = False
        """Whether the loop looks by itself for what is told; it says no before it looks last."""
        self._collection: asyncio.TimerHandle | None = None
        self._pass_began = 0.0
        # A daemon: a pass that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="llama.cpp", daemon=True)
        self._thread.start()

    @property
    def pass_s(self) -> float:
        """For how long the present pass has been computed; 0 between passes."""
        began = self._pass_began
        return time.monotonic() - began if began else 0.0

    def attach(self, speaker: Speaker) -> None:
        """The speaker may be submitted to."""
        schedule = Schedule(
            lanes=speaker.room.lanes,
            cells=speaker.room.cells,
            batch_tokens=BATCH_TOKENS,
            most_reads=speaker.most_reads,
            idle_cells=speaker.idle_cells,
        )
        desk = _Desk(speaker, schedule)
        self._order(lambda: self._desks.__setitem__(speaker, desk))

    async def detach(self, speaker: Speaker) -> None:
        """The speaker is not stepped any more, and may be closed; it has no tickets."""
        gone: asyncio.Future[None] = self._loop.create_future()

        def take_away() -> None:
            self._desks.pop(speaker)
            self._loop.call_soon_threadsafe(_set, gone)

        self._order(take_away)
        await asyncio.wait({gone, self.ended}, return_when=asyncio.FIRST_COMPLETED)

    def submit(self, speaker: Speaker, ticket: Ticket) -> None:
        """The ticket's pieces will come, the last with a `finish`."""

        def take() -> None:
            desk = self._desks[speaker]
            desk.tickets[ticket.run.sequence] = ticket
            desk.schedule.add(ticket.run.sequence)

        self._order(take)

    def cancel(self, speaker: Speaker, ticket: Ticket) -> None:
        """No more is computed for the ticket; one that is over is no error."""

        def drop() -> None:
            desk = self._desks.get(speaker)
            if desk is not None and desk.tickets.pop(ticket.run.sequence, None) is not None:
                desk.schedule.end(ticket.run.sequence)

        self._order(drop)

    def stop(self) -> None:
        """The thread ends after its present pass."""
        with self._some:
            self._stopping = True
            self._some.notify()

    def _order(self, order: Callable[[], None]) -> None:
        with self._some:
            self._orders.append(order)
            self._some.notify()

    def _run(self) -> None:
        try:
            while self._take_orders():
                for desk in list(self._desks.values()):
                    if desk.tickets:
                        self._step(desk)
                self._count()
        except BaseException as error:  # noqa: BLE001 - carried to who awaits `ended`, not handled
            self._tell(lambda error=error: self.ended.set_exception(error))
        else:
            self._tell(lambda: _set(self.ended))

    def _tell(self, call: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: nobody listens
            log.warning("worker_outlived_the_loop")

    def _take_orders(self) -> bool:
        """Orders are done; waits for one where there is no work. False: time to stop."""
        with self._some:
            while not (
                self._orders or self._stopping or any(d.tickets for d in self._desks.values())
            ):
                self._some.wait()
            orders, self._orders = self._orders, deque()
        for order in orders:
            order()
        return not self._stopping

    def _step(self, desk: _Desk) -> None:
        """One pass of one speaker; its pieces are on their way."""
        plan = desk.schedule.next()
        self._count()  # now as well: a pass that waits for a server may take long
        if not plan.shares:
            return
        runs = {sequence: ticket.run for sequence, ticket in desk.tickets.items()}
        self._pass_began = time.monotonic()
        try:
            heard = desk.speaker.speak(plan, desk.schedule, runs)
        except EngineError as error:
            self._failed(desk, plan.shares, str(error))
            return
        finally:
            self._pass_began = 0.0
        self.counts.passes += 1
        self.counts.tokens += plan.size
        told: list[tuple[Ticket, Piece]] = []
        settled: list[Settled] = []
        not_finite = self.counts.not_finite
        for one in heard:
            piece = self._taken(desk, one, settled)
            if piece is not None:
                told.append((desk.tickets[one.share.sequence], piece))
        desk.speaker.settle(settled)
        for ticket, piece in told:
            if piece.finish:
                self._end(desk, ticket.run.sequence)
        if self.counts.not_finite > not_finite:
            desk.speaker.clear()
            desk.schedule.reset()
        self._deliver(told)

    def _taken(self, desk: _Desk, heard: Heard, settled: list[Settled]) -> Piece | None:
        """The sequence has used what was heard, and the schedule knows what of it stays."""
        sequence, before = heard.share.sequence, len(heard.share.sequence.tokens)
        piece: Piece | None = None
        taken = 0
        if heard.error:
            piece = Piece(finish="error", error=heard.error)
        elif heard.share.reads:
            if np.isfinite(heard.logits.max(axis=1)).all():
                piece = desk.tickets[sequence].run.take(heard.logits, heard.drafts)
            else:  # the largest of a row with a NaN is NaN
                piece = Piece(finish="error", error="the model's answer is not finite")
                self.counts.not_finite += 1
            while taken < len(heard.drafts) and sequence.tokens[before + taken :][:1] == [
                heard.drafts[taken].token
            ]:
                taken += 1
            settled.append(Settled(heard, taken, bool(piece and piece.finish)))
        desk.schedule.fed(heard.share, heard.share.count - len(heard.drafts) + taken)
        return piece

    def _failed(self, desk: _Desk, shares: list[Share], why: str) -> None:
        """Those whose pass failed are told; the others begin again in an empty cache."""
        log.error("pass_failed", why=why, sequences=len(shares))
        self.counts.failed_passes += 1
        tickets = [desk.tickets[share.sequence] for share in shares]
        for ticket in tickets:
            self._end(desk, ticket.run.sequence)
        desk.speaker.clear()
        desk.schedule.reset()
        self._deliver([(ticket, Piece(finish="error", error=why)) for ticket in tickets])

    def _end(self, desk: _Desk, sequence: Sequence) -> None:
        desk.tickets.pop(sequence)
        desk.schedule.end(sequence)

    def _count(self) -> None:
        running = waiting = preempted = 0
        for desk in self._desks.values():
            running += len(desk.schedule.running)
            waiting += len(desk.schedule.waiting)
            preempted += desk.schedule.preempted
        self.counts.running, self.counts.waiting = running, waiting
        self.counts.preempted = preempted

    def _deliver(self, told: list[tuple[Ticket, Piece]]) -> None:
        """An answer's first piece and its last are handed over at once."""
        if not told:
            return
        self._told.extend(told)
        urgent = False
        for ticket, piece in told:
            urgent = urgent or piece.finish is not None or not ticket.told
            ticket.told = True
        if urgent or not self._collected:
            self._collected = True
            self._tell(self._collect)

    def _collect(self) -> None:
        """In the loop: what is told is handed over, and soon looked for again if there was any."""
        if self._collection is not None:
            self._collection.cancel()
            self._collection = None
        self._collected = False
        if not self._told:
            return
        self._collected = True
        while self._told:
            ticket, piece = self._told.popleft()
            ticket.pieces.put_nowait((ticket.index, piece))
        self._collection = self._loop.call_later(_COLLECTED_S, self._collect)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
