"""One job as its device follows it: the log's rounds are applied to the engine's adapter in order.

Whatever the engine loses (a child that died, a digest that is not the log's) is made good by
opening the job again and catching up, from a snapshot or by replay, whichever should take less
time. Only `run` moves the adapter; work waits in `reaches` and holds it still in `measure`.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Container, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from edge_client import history
from edge_client.engine import EngineLost
from edge_client.history import Opening, Tail
from edge_client.measured import Ask, Measured
from edge_client.replica import Device, DigestMismatch, Replica
from edge_client.state import Fate, Position, fate, snapshot_is_faster
from shared import log as joblog
from shared.bus import Bus
from shared.clock import backoff_s
from shared.engine.protocol import Held, Look
from shared.errors import EngineDied, EngineError, MalformedMessage, TransientError
from shared.logs import get
from shared.messages import (
    EpochOpened,
    JobEnded,
    LogEvent,
    ModelPublished,
    RoundClosed,
    WorkAssigned,
)

log = get("following")

CHECK_S = 300.0
"""A log that is silent for so long is looked at, in case its newest entry was lost."""
TRIES = 3
"""So often the engine may die, disagree with the log or lack its model before it is given up."""
QUEUED = 64
BEHIND = 32
"""So many events of the log wait only after an absence: perhaps a snapshot is faster then."""

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Following:
    """One job; `problem` says why it was given up, if it was."""

    def __init__(self, device: Device, bus: Bus, job: str, spawn: Spawn) -> None:
        self._device = device
        self._bus = bus
        self._spawn = spawn
        self.job = job
        self.ended = False
        self.problem = ""
        self._stopping = False
        self._replica = Replica(device, job, self._notify)
        self._still = asyncio.Lock()
        self._changed = asyncio.Event()
        self._opening: Opening | None = None
        self._queue: asyncio.Queue[tuple[int, LogEvent] | None] = asyncio.Queue(QUEUED)

    @property
    def position(self) -> Position | None:
        """The last proven one."""
        return self._replica.position

    @property
    def doing(self) -> str:
        """What it is busy with, for people."""
        return self._replica.doing

    # What work asks

    async def reaches(self, assigned: WorkAssigned, held: Container[str]) -> Fate:
        """`do` once the adapter stands where `assigned` wants it; else why it never will.

        Raises:
            EngineError: the job was given up; says why.
        """
        while True:
            changed = self._changed
            if self.problem:
                raise EngineError(self.problem)
            verdict = fate(assigned, self._proven, held)
            if verdict == "wait" and (self.ended or self._stopping):
                verdict = "passed"
            if verdict != "wait":
                return verdict
            if not self._replica.alive:
                self._nudge()
            await changed.wait()

    async def measure(
        self, assigned: WorkAssigned, work: Callable[[Ask], Awaitable[Measured]]
    ) -> Measured | None:
        """What `work` measures at the adapter that `assigned` names; None if it has moved on.

        Raises:
            EngineError: the engine refused or died.
        """
        async with self._still:
            if fate(assigned, self._proven, ()) != "do":
                return None
            try:
                return await work(self._replica.ask)
            except (EngineDied, EngineLost):
                self._replica.lose()
                self._nudge()
                raise

    async def look(self) -> Held | None:
        """What data the engine holds for the job now; None where it does not hold the job."""
        async with self._still:
            if not self._replica.alive:
                return None
            try:
                return await self._replica.ask(Look(job=self.job), Held)
            except (EngineDied, EngineLost):
                self._replica.lose()
                self._nudge()
            except EngineError as error:
                log.warning("data_not_read", job=self.job, why=str(error))
            return None

    def stop(self) -> None:
        """Let go of whoever waits in `reaches`."""
        self._stopping = True
        self._notify()

    # What the log says

    async def run(self) -> None:
        """The adapter has followed the log to the job's end, or `problem` says why it could not."""
        troubles = waits = 0
        while not (self.ended or self.problem):
            try:
                async with self._still:
                    await self._stand_up(troubles)
                waits = 0
                async with self._events():
                    while not self.ended and self._replica.alive and not self._behind:
                        item = await self._queue.get()
                        if item is not None:
                            async with self._still:
                                await self._take(*item)
                            troubles = 0
            except TransientError as error:
                waits += 1
                self._replica.doing = f"waiting for the link: {error}"
                log.warning("following_put_off", job=self.job, why=str(error))
                if waits >= TRIES and self._bus.connected:
                    self._give_up(str(error))
                else:
                    await asyncio.sleep(max(error.delay_s, backoff_s(waits, first_s=0.5)))
            except (EngineDied, EngineLost, DigestMismatch) as error:
                troubles += 1
                self._replica.lose()
                log.warning("following_lost_adapter", job=self.job, why=str(error))
                if troubles >= TRIES:
                    self._give_up(str(error))
            except (EngineError, MalformedMessage) as error:
                self._give_up(str(error))
            except OSError as error:
                self._give_up(f"{self._device.state_dir}: {error.strerror}; make room, or move it")
        async with self._still:
            await self._replica.close()

    @asynccontextmanager
    async def _events(self) -> AsyncGenerator[None, None]:
        """While it lasts, the log's further events come into the queue."""
        pump = self._spawn(self._pump())
        try:
            yield
        finally:
            pump.cancel()
            await asyncio.wait({pump})
            while not self._queue.empty():
                self._queue.get_nowait()

    async def _pump(self) -> None:
        after = self.position.sequence if self.position else 0
        events = joblog.follow(self._bus, self._device.streams, self.job, after, check_s=CHECK_S)
        async with aclosing(events):
            async for item in events:
                await self._queue.put(item)

    async def _stand_up(self, troubles: int) -> None:
        """The job is open in the engine, at the log's end."""
        device = self._device
        if self._opening is None:
            self._opening = await history.opening(device.streams, self.job)
        opening, start = self._opening, self._proven
        self._replica.doing = "reading the log"
        after = start.sequence if start else opening.sequence
        tail = await history.tail(device.streams, self.job, after, device.link, device.clock)
        if start is None and tail.entries and isinstance(tail.entries[-1].event, JobEnded):
            self._end()  # nothing is left to be done for it
            return
        # What the log has before the newest epoch need not be read.
        stood = start.epoch if start else opening.epoch.epoch
        newest = await history.newest_epoch(device.streams, self.job, stood, tail)
        if newest is None and start is None:
            newest = opening
        if newest is not None:
            await self._replica.open(opening.opened.spec, newest.epoch, newest.sequence)
            after = newest.sequence
        before = self._replica.round
        snapshot = self._preferred(tail, troubles)
        restored = snapshot is not None and await self._replica.restore(snapshot, tail.after)
        if not restored and tail.after > after:
            stretch = history.entries(device.streams, self.job, after, tail.after)
            async with aclosing(stretch):
                async for entry in stretch:
                    await self._take(entry.sequence, entry.event)
        for entry in tail.entries:
            await self._take(entry.sequence, entry.event)
        if not restored and self._replica.round > before:
            device.counters.add("catch_up_replays")

    def _preferred(self, tail: Tail, troubles: int) -> ModelPublished | None:
        """The snapshot to take; after a mismatch the newest whatever it costs, after two none."""
        snapshot, position = tail.snapshot, self.position
        if snapshot is None or position is None or snapshot.epoch != position.epoch:
            return None
        rounds = snapshot.round - position.round
        read = sum(
            isinstance(entry.event, RoundClosed)
            and position.round < entry.event.round <= snapshot.round
            for entry in tail.entries
        )
        faster = snapshot_is_faster(
            rounds=rounds,
            round_bytes=tail.close_bytes * (1 - read / max(1, rounds)),  # what is here is free
            apply_s=self._replica.apply_s,
            snapshot_bytes=snapshot.snapshot.size_bytes,
            bytes_per_s=self._device.link.bytes_per_s,
        )
        return snapshot if (faster if not troubles else troubles == 1) else None

    async def _take(self, sequence: int, event: LogEvent) -> None:
        """Move by one event of the log; what was taken before has no effect."""
        position = self.position
        if position is None or sequence <= position.sequence:
            return
        match event:
            case EpochOpened() if event.epoch > position.epoch and self._opening is not None:
                await self._replica.open(self._opening.opened.spec, event, sequence)
            case RoundClosed() if event.epoch == position.epoch and event.round > position.round:
                await self._replica.apply(event, sequence)
            case JobEnded():
                self._end()
            case _:
                self._replica.read(sequence)

    @property
    def _behind(self) -> bool:
        return self._queue.qsize() >= BEHIND

    @property
    def _proven(self) -> Position | None:
        return self._replica.position if self._replica.alive else None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _nudge(self) -> None:
        """Let `run` look whether the engine still holds the job."""
        if self._queue.empty():
            self._queue.put_nowait(None)

    def _end(self) -> None:
        self.ended = True
        self._notify()

    def _give_up(self, why: str) -> None:
        self.problem = why
        log.error("job_given_up", job=self.job, why=why)
        self._notify()
