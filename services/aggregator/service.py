"""Bus to state and back: takes messages, logs what `state` decides, does what follows."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

from services.aggregator.config import Settings
from services.aggregator.folding import Outcome
from services.aggregator.opening import most_snapshot_bytes, open_job
from services.aggregator.state import EVALUATION_ROUNDS, JobState
from services.aggregator.store import Store
from shared import blobs, subjects
from shared.bus import Bus, Delivery, Stored, Streams
from shared.clock import Clock
from shared.codec import check_sender, decode, encode
from shared.errors import MalformedMessage, RejectError, TransientError
from shared.log import ensure_streams, read_patiently
from shared.log_writer import LogWriter
from shared.logs import get
from shared.messages import (
    DetailEvent,
    JobAccepted,
    JobOpened,
    JobsListed,
    ListJobs,
    LogEvent,
    Message,
    OpenEpoch,
    Refused,
    RoundClosed,
    RoundOpened,
    StopJob,
    SubmitJob,
    SubmitUpdate,
    UpdateSettled,
)
from shared.metrics import Counters
from shared.patience import patiently
from shared.runtime import Stop, settle
from shared.service import flushed, report_counters

log = get("aggregator")

TICK_S = 0.1
TAKE_WAIT_S = 5.0
MAX_LISTED = 2000
"""Jobs that fit one answer; the newest."""
PUT_OFF_S = 10.0
"""When a batch comes again of which something could not be handled; the rest are duplicates."""


class Aggregator:
    """All jobs of one log. One decision at a time: `_turn` is held from decide to effects."""

    def __init__(self, bus: Bus, streams: Streams, settings: Settings, clock: Clock) -> None:
        self.jobs: dict[str, JobState] = {}
        self.counters = Counters()
        self._bus = bus
        self._streams = streams
        self._settings = settings
        self._clock = clock
        self._turn = asyncio.Lock()
        self._opened_at: dict[str, float] = {}
        self._store = Store(streams, clock, self.counters)
        self._log: LogWriter
        self._detail: LogWriter

    async def serve(self, stop: Stop, ready: Callable[[], None] = lambda: None) -> None:
        """Replay the log, do what a crash left undone, then serve until `stop`."""
        await ensure_streams(self._streams, self._settings.stream_replicas)
        await self.replay()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._requests()),
                tasks.create_task(self._ticks()),
                tasks.create_task(
                    report_counters(
                        self._bus,
                        "aggregator",
                        self.counters,
                        self._clock,
                        self._settings.report_every_s,
                        self._problem,
                    )
                ),
            ]
            ready()
            log.info("aggregator_ready", jobs=len(self.jobs))
            await self._updates(stop)
            for task in background:
                task.cancel()
        await flushed(self._bus)

    async def replay(self) -> None:
        """Evolve over LOG, then over the part of DETAIL that may still matter."""
        self._log = await LogWriter.open(self._streams, subjects.LOG_STREAM, self.counters)
        await self._log.claim()
        self._detail = await LogWriter.open(self._streams, subjects.DETAIL_STREAM, self.counters)
        await self._detail.claim()
        await self._log.check()  # a third one may have started meanwhile
        counted: dict[str, list[int]] = {}
        everything = read_patiently(
            self._streams, subjects.LOG_STREAM, subjects.ALL_LOGS, up_to=self._log.last
        )
        async with aclosing(everything) as events:
            async for sequence, event in events:
                if isinstance(event, LogEvent):
                    self._evolve(event, sequence)
                if isinstance(event, RoundClosed):
                    counted.setdefault(event.job, []).append(event.detail_sequence)
        for name, job in self.jobs.items():
            if job.ended:
                continue
            await settle(self._store.bring(job), self.counters, what="start")
            # Older rounds than these can have no latecomers any more.
            closes = counted.get(name, [])[: -EVALUATION_ROUNDS - 2]
            after = closes[-1] if closes else 0
            own = subjects.detail(name)
            private = read_patiently(
                self._streams, subjects.DETAIL_STREAM, own, after, await self._last_detail(own)
            )
            async with aclosing(private) as details:
                async for sequence, detail in details:
                    job.evolve(detail, sequence)

    async def _last_detail(self, subject: str) -> int:
        async def last() -> int:
            return await self._streams.last_sequence(subjects.DETAIL_STREAM, subject)

        return await patiently(last, "last_sequence")

    def _problem(self) -> str:
        """What keeps the aggregator from doing all of its work; empty if nothing does."""
        return self._log.problem or self._detail.problem or self._store.problem

    # ---- what comes in

    async def _requests(self) -> None:
        pattern = f"{subjects.PREFIX}.job.*"
        async with self._bus.subscribe(pattern, queue="aggregator") as deliveries:
            async for delivery in deliveries:
                await settle(self._on_request(delivery), self.counters, what="request")

    async def _on_request(self, delivery: Delivery) -> None:
        try:
            request = decode(delivery.data, Message)
            answer = await self.answer(request)
        except RejectError as error:
            self.counters.add("jobs_refused")
            answer = Refused(reason=str(error))
        await self._reply(delivery, answer)

    async def answer(self, request: Message) -> Message:
        """What an operator's request comes to.

        Raises:
            RejectError: it cannot be carried out; the text names the mend.
        """
        match request:
            case SubmitJob():
                return await self._submit(request)
            case StopJob():
                return await self._stop_job(request)
            case OpenEpoch():
                return await self._open_epoch(request)
            case ListJobs():
                begun = [job for job in self.jobs.values() if job.begun]
                return JobsListed(jobs=[job.summary() for job in begun[-MAX_LISTED:]])
            case _:
                raise MalformedMessage(f"{type(request).__name__} is no request of an operator")

    async def _submit(self, request: SubmitJob) -> Message:
        async with self._turn:
            known = self.jobs.get(request.job)
            if known is not None and known.begun:
                raise RejectError(f"job {request.job!r} exists already; choose another name")
            for event in open_job(request):
                await self._commit(event)
            log.info("job_opened", job=request.job, rounds=request.spec.tuning.rounds)
            await settle(self._go_on(self.jobs[request.job]), self.counters, what="job")
        return JobAccepted(job=request.job)

    async def _stop_job(self, request: StopJob) -> Message:
        job = self.jobs.get(request.job)
        if job is None or job.ended or not job.begun:
            raise RejectError(f"no job {request.job!r} is running; see `seedwire job list`")
        async with self._turn:
            try:
                await self._bring(job)
                await self._go_on(job)
            except blobs.NotStored:
                log.warning("stopped_without_its_start", job=job.job)
            for event in job.decide_stop():
                await self._commit(event)
            await settle(self._go_on(job), self.counters, what="job")
        return JobAccepted(job=request.job)

    async def _open_epoch(self, request: OpenEpoch) -> Message:
        job = self.jobs.get(request.job)
        if job is None or job.ended or not job.begun:
            raise RejectError(f"no job {request.job!r} is running; see `seedwire job list`")
        most = most_snapshot_bytes(request.manifest)
        start = await self._store.named("start", request.start, most)
        anchor = request.anchor and await self._store.named("anchor", request.anchor, most)
        async with self._turn:
            if job.start is None:  # else it does not wait
                await self._go_on(job)
            event = job.decide_epoch(request, start, anchor)
            await self._commit(event)
            job.begin(start)
            log.info("epoch_opened", job=job.job, epoch=event.epoch, digest=event.digest)
            await settle(self._go_on(job), self.counters, what="job")
        return JobAccepted(job=request.job)

    async def _bring(self, job: JobState) -> None:
        """As `Store.bring`, for somebody who waits for an answer.

        Raises:
            NotStored: its start is not in the store.
            RejectError: nobody knows, for now.
        """
        try:
            await self._store.bring(job, anew=True)
        except blobs.NotStored:
            raise
        except TransientError as error:
            raise RejectError(f"{error}; then ask again") from error

    async def _updates(self, stop: Stop) -> None:
        """Fold batches until `stop`; a batch in hand is finished."""
        while not stop.asked:
            taking = asyncio.ensure_future(
                self._streams.take(
                    subjects.UPDATES_STREAM,
                    "aggregator",
                    limit=self._settings.batch,
                    wait_s=TAKE_WAIT_S,
                )
            )
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({taking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not taking.done():
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)
                return
            try:
                batch = taking.result()
            except TransientError as error:
                log.warning("updates_not_taken", error=str(error))
                await stop.sleep(error.delay_s)
                continue
            if batch is None:
                continue
            if await self._folded(batch.messages):
                await batch.done()
            else:
                await batch.again(PUT_OFF_S)

    async def _folded(self, messages: Sequence[Stored]) -> bool:
        """Whether all of a batch is settled; one that cannot be handled holds up no other."""
        outcome, _ = await settle(self.fold(messages), self.counters, what="updates")
        if outcome == "failed" and len(messages) > 1:
            return all([await self._folded([message]) for message in messages])
        return outcome in ("done", "rejected")

    async def fold(self, messages: Sequence[Stored]) -> None:
        """Decide, log, evolve and settle one batch of stored updates."""
        by_job: dict[str, list[SubmitUpdate]] = {}
        for message in messages:
            try:
                update = decode(message.data, SubmitUpdate)
                own = subjects.update(update.key.job, update.key.device)
                check_sender(message.subject, own)
            except RejectError as error:
                self.counters.add("messages_malformed")
                await self._settled_unread(message, str(error))
            else:
                by_job.setdefault(update.key.job, []).append(update)
        for name, updates in by_job.items():
            await self._fold_job(name, updates)

    async def _fold_job(self, name: str, updates: Sequence[SubmitUpdate]) -> None:
        async with self._turn:
            job = self.jobs.get(name)
            if job is None or not job.begun:
                reason = f"job {name!r} is unknown here"
                await self._settle(updates, [Outcome("rejected", reason)] * len(updates))
                return
            # An earlier turn was cut short. Without a start the job cannot go on, but it can count.
            if job.open is None and not job.ended and job.start is None:
                await self._go_on(job)
            while updates:
                event, outcomes = job.decide_updates(updates)
                taken, updates = updates[: len(outcomes)], updates[len(outcomes) :]
                if event is not None:
                    await self._detail_commit(job, event)
                await self._settle(taken, outcomes)
                await settle(self._go_on(job), self.counters, what="round")

    async def _ticks(self) -> None:
        """Close what is overdue, and take up what a crash or the broker cut short."""
        while True:
            now = self._clock.now()
            for job in list(self.jobs.values()):
                opened = job.open
                overdue = opened and now - self._opened_at[job.job] >= opened.deadline_s
                asleep = not job.begun or job.ended or self._store.put_off(job)
                if not asleep and (overdue or not opened):
                    await settle(self._overdue(job, opened), self.counters, what="deadline")
            await self._clock.sleep(TICK_S)

    async def _overdue(self, job: JobState, opened: RoundOpened | None) -> None:
        async with self._turn:
            await self._store.bring(job)
            if opened is not None and job.open is opened:
                for event in job.decide_close(overdue=True):
                    await self._commit(event)
            await self._go_on(job)

    # ---- what follows from the log

    async def _go_on(self, job: JobState) -> None:
        """Log evaluations, close, report, publish and open until the log lacks nothing.

        The caller holds `_turn` over this and what led to it: nobody sees a job between two rounds.
        """
        await self._store.bring(job)
        while True:
            published = await self._publish(job)
            await self._store.tidy(job, self.jobs.values())
            events = job.decide_next()
            for event in events:
                if isinstance(event, DetailEvent):
                    await self._detail_commit(job, event)
                else:
                    await self._commit(event)
            if not (events or published):
                return

    async def _publish(self, job: JobState) -> bool:
        if not job.snapshot_due or job.open is not None:
            return False
        await self._commit(job.decide_published(await self._store.put(job)))
        return True

    async def _commit(self, event: LogEvent) -> None:
        sequence = await self._log.append(event.job, event)
        self.counters.add("log_appends")
        self._evolve(event, sequence)
        if isinstance(event, RoundClosed):
            self.counters.add("rounds_closed")
            self.counters.add("rounds_abandoned", event.reason == "abandoned")
            log.info(
                "round_closed",
                job=event.job,
                round=event.round,
                reason=event.reason,
                devices=event.devices,
                probes=event.probes,
                loss=event.loss,
            )

    async def _detail_commit(self, job: JobState, event: DetailEvent) -> None:
        sequence = await self._detail.append(event.job, event)
        self.counters.add("log_appends")
        job.evolve(event, sequence)

    def _evolve(self, event: LogEvent, sequence: int) -> None:
        job = self.jobs.get(event.job)
        if isinstance(event, JobOpened) and not (job and job.begun):
            job = self.jobs[event.job] = JobState(event)
        if job is None:
            self.counters.add("messages_malformed")
            log.warning("event_of_unknown_job", job=event.job, event_type=type(event).__name__)
            return
        before = job.open
        job.evolve(event, sequence)
        if job.open is not before:
            self._opened_at[job.job] = self._clock.now()

    # ---- what goes out

    async def _reply(self, delivery: Delivery, answer: Message) -> None:
        if delivery.reply:
            await self._bus.publish(delivery.reply, encode(answer))

    async def _settle(self, updates: Sequence[SubmitUpdate], outcomes: Sequence[Outcome]) -> None:
        """Tell the devices. The last word on an update is only for who knows all of the log."""
        if any(outcome.word in ("rejected", "too_late") for outcome in outcomes):
            await self._log.check()
        for update, outcome in zip(updates, outcomes, strict=True):
            self.counters.add(f"updates_{outcome.word}")
            if outcome.word == "rejected":
                log.warning("update_rejected", key=update.key.text(), reason=outcome.reason)
            message = UpdateSettled(
                key=update.key.text(), outcome=outcome.word, reason=outcome.reason
            )
            await self._bus.publish(subjects.settled(update.key.device), encode(message))

    async def _settled_unread(self, message: Stored, reason: str) -> None:
        """Settle an update that cannot be read, by the key that its header names."""
        self.counters.add("updates_rejected")
        device = subjects.last_token(message.subject)
        key = message.headers.get(subjects.KEY_HEADER, "").encode(errors="replace").decode()
        log.warning("update_unreadable", device=device, key=key, reason=reason)
        if key:
            settled = UpdateSettled(key=key[:400], outcome="rejected", reason=reason[:500])
            await self._bus.publish(subjects.settled(device), encode(settled))
