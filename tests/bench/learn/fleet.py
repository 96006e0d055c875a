"""One job over real services and edge clients, all in one process, in virtual time.

The aggregator and the scheduler are the services themselves; each device is the edge client's own
`Edge`, with its spool and the engine's handling of requests in this process. The bus alone is
another, in memory. No time passes but what computing takes: whoever waits, waits in virtual time.
"""

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_client.config import Settings as EdgeSettings
from edge_client.service import Edge
from edge_client.spool import Spool
from services.aggregator.config import Settings as AggregatorSettings
from services.aggregator.service import Aggregator
from services.scheduler.config import Settings as SchedulerSettings
from services.scheduler.service import Scheduler
from shared import subjects
from shared.codec import decode, encode
from shared.engine.protocol import OpenJob, RequestUnion
from shared.errors import ConfigError, EngineError
from shared.messages import JobAccepted, JobEnded, LogEvent, Message, RoundClosed, SubmitJob
from shared.runtime import Stop
from tests.bench.learn.curve import Ended, Point
from tests.bench.learn.engines import Closes, InProcess, Judge
from tests.bench.learn.pacing import Pace
from tests.bench.learn.tasks import LearnTask
from tests.bench.learn.wire import Metered, Wire
from tests.chaos.simulation import SimulatedClock, SimulatedLoop

JOB = "learn"
REPORTED_S = 30.0
"""So long devices have to report before the job is submitted."""
FRUITLESS = 3
"""After so many rounds in a row without a measurement the adapter counts as diverged."""
SILENT_DEADLINES = 3
"""After so many deadlines without a close something is wrong."""


class Fleet:
    """Devices, services and a judge around one job; `run` lasts until the job or the pace ends."""

    def __init__(
        self, task: LearnTask, submitted: SubmitJob, model: Path, pace: Pace, seed: int
    ) -> None:
        wanted = submitted.spec.pacing.enough_devices
        if wanted > len(task.devices):
            raise ConfigError(
                f"each round of {task.name} would wait for {wanted} devices, there are "
                f"{len(task.devices)}: lower pacing.enough_devices in settings.py"
            )
        self.points: list[Point] = []
        self.ended: Ended = "finished"
        self.facts: Counter[str] = Counter()
        self.grown: Callable[[], None] = lambda: None
        """Called after each new point."""
        self._task = task
        self._submitted = submitted
        self._model = model
        self._pace = pace
        self._seed = seed
        self._loop = SimulatedLoop()
        self._wire = Wire(self._fact)
        self._closes = Closes()
        self._over = asyncio.Event()
        self._links: list[Metered] = []
        self._engines: dict[str, InProcess] = {}
        self._judge: Judge
        self._commits = self._fruitless = 0
        self._closed_at = 0.0
        self._judging_s = 0.0
        self._began = 0.0

    def run(self) -> None:
        """The job is over; `points` and `ended` say what it came to."""
        random.seed(f"learn {self._seed}")  # pauses are jittered
        asyncio.set_event_loop(self._loop)
        memory = Path("/dev/shm")
        place = memory if memory.is_dir() else None
        try:
            with tempfile.TemporaryDirectory(prefix="learn-", dir=place) as folder:
                self._loop.run_until_complete(self._all(Path(folder)))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            self._loop.close()

    def round_one(self) -> tuple[OpenJob, RequestUnion] | None:
        """What the engine of the largest device of round 1 was asked; its rows' file is gone."""
        by_rows = sorted(self._engines, key=lambda name: -len(self._task.devices[name]))
        for engine in (self._engines[name] for name in by_rows):
            if engine.opened and engine.first and getattr(engine.first, "round", 0) == 1:
                return engine.opened, engine.first
        return None

    async def _all(self, folder: Path) -> None:
        heldout = _rows(folder / "heldout.jsonl", self._task.heldout)
        self._judge = Judge(
            OpenJob(
                job=JOB,
                manifest=self._submitted.manifest,
                task=self._submitted.spec.task,
                model=str(self._model),
                data="",
                heldout=heldout,
                device="judge",
            ),
            self._closes,
        )
        stop = Stop()
        async with asyncio.TaskGroup() as group:
            await self._serve(group, stop)
            for name, rows in self._task.devices.items():
                (folder / name).mkdir()
                group.create_task(self._edge(folder / name, name, rows, stop))
            watch = group.create_task(self._watched())
            await asyncio.sleep(REPORTED_S)
            self._began, self._judging_s = time.perf_counter(), 0.0
            self._measure()
            await self._submit()
            self._closed_at = self._loop.time()
            await self._over.wait()
            watch.cancel()
            stop.set()

    async def _serve(self, group: asyncio.TaskGroup, stop: Stop) -> None:
        for name in ("aggregator", "scheduler"):
            ready = asyncio.Event()
            link, clock = self._wire.connect(name), self._clock()
            if name == "aggregator":
                settings = AggregatorSettings(report_every_s=3600.0)
                service = Aggregator(link, link, settings, clock)
            else:
                planning = SchedulerSettings(report_every_s=3600.0, seed=self._seed)
                service = Scheduler(link, link, planning, clock)
            group.create_task(service.serve(stop, ready.set))
            await ready.wait()

    async def _edge(self, state: Path, name: str, rows: list[dict[str, str]], stop: Stop) -> None:
        settings = EdgeSettings(
            device=name,
            data=_rows(state / "rows.jsonl", rows),
            state_dir=str(state),
            models=[str(self._model)],
            max_ledger_bytes=65536,
        )
        spool = Spool(
            state / "spool",
            max_bytes=settings.max_spool_bytes,
            max_ledger_bytes=settings.max_ledger_bytes,
        )
        link = self._wire.connect(name)
        self._links.append(link)
        engine = self._engines[name] = InProcess(self._closes)
        edge = Edge(settings, link, link, spool, engine, self._clock())
        await edge.run(stop)
        self.facts["work_declined"] += edge.counters.get("work_declined")
        self.facts["digest_mismatches"] += edge.counters.get("digest_mismatches")

    async def _submit(self) -> None:
        link = self._wire.connect("operator")
        answer = decode(
            await link.request(subjects.JOB_SUBMIT, encode(self._submitted), timeout_s=60.0),
            Message,
        )
        if not isinstance(answer, JobAccepted):
            raise ConfigError(f"the job was refused: {msgspec.to_builtins(answer)}")

    async def _watched(self) -> None:
        patience_s = SILENT_DEADLINES * self._submitted.spec.pacing.deadline_s
        while True:
            await asyncio.sleep(patience_s)
            if self._loop.time() - self._closed_at > patience_s:
                raise RuntimeError(f"no round has closed for {patience_s:g} s of virtual time")

    # ---- what the log says

    def _fact(self, event: LogEvent) -> None:
        """Called inside the append, so nothing of the next round is spent yet."""
        if isinstance(event, JobEnded):
            self._end("finished")
        if not isinstance(event, RoundClosed) or self._over.is_set():
            return
        self._closed_at = self._loop.time()
        self.facts[f"closed: {event.reason}"] += 1
        self.facts["rounds"] += 1
        self._judge.apply(event.round, event.commit, event.digest)
        self._fruitless = 0 if event.probes else self._fruitless + 1
        if self._fruitless >= FRUITLESS:
            self._end("diverged")
        if event.commit is None:
            return
        self._commits += 1
        tokens = self._wire.account.forward_tokens
        if self._pace.due(self._commits, tokens) and not self._measure():
            self._end("diverged")
        elif verdict := self._pace.verdict(self.points, tokens):
            self._end(verdict)

    def _measure(self) -> bool:
        """A further point; False where the loss is no number any more."""
        began = time.perf_counter()
        try:
            told = self._judge.measured()
        except EngineError:
            return False
        finally:
            self._judging_s += time.perf_counter() - began
        devices = max(1, len(self._links))
        self.points.append(
            Point(
                commits=self._commits,
                forward_tokens=self._wire.account.forward_tokens,
                loss=told.loss / told.weight,
                accuracy=told.correct / told.examples,
                wall_s=time.perf_counter() - self._began - self._judging_s,
                up_bytes=sum(link.up for link in self._links) / devices,
                down_bytes=sum(link.down for link in self._links) / devices,
            )
        )
        self.grown()
        return True

    def _end(self, why: Ended) -> None:
        if self._over.is_set():
            return
        if why != "diverged" and self.points[-1].commits < self._commits and not self._measure():
            why = "diverged"
        self.ended = why
        self.facts["updates"] = self._wire.account.updates
        self.facts["messages"] = self._wire.messages
        self._over.set()

    def _clock(self) -> SimulatedClock:
        return SimulatedClock(self._loop, lambda: self._wire.messages, 0.0)


def _rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
