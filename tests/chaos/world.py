"""One schedule: a fleet in memory, its faults, its witness; a function of the scenario alone."""

import asyncio
import contextvars
import dataclasses
import hashlib
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_client.config import Settings as EdgeSettings
from edge_client.service import Edge
from edge_client.spool import Spool
from services.aggregator.config import Settings as AggregatorSettings
from services.aggregator.service import Aggregator
from services.scheduler.config import Settings as SchedulerSettings
from services.scheduler.service import Scheduler
from shared import blobs, subjects
from shared.codec import decode, encode
from shared.errors import TransientError
from shared.messages import (
    Message,
    StopJob,
)
from tests.chaos.brokers import WatchedBroker
from tests.chaos.disks import Platters, SimulatedDisk
from tests.chaos.engines import EngineDouble
from tests.chaos.faults import Fault, Scenario
from tests.chaos.folding import Fields
from tests.chaos.operators import a_job, next_epoch
from tests.chaos.processes import Process
from tests.chaos.simulation import PROCESS, SimulatedClock, SimulatedLoop, SimulatedTask
from tests.chaos.weather import Skies
from tests.chaos.witness import Witness

GRACE_S = 45.0
"""Over its deadline a round may be open so long: quiet ticks, and a broker that is silent."""
PATIENCE_S = 12 * 3600.0
"""So long after the last fault every job has ended and every spool is empty."""
LOOK_S = 20.0
UPDATE_BYTES, LINE_BYTES = 600, 120
"""More than one takes, in a spool and in a ledger."""
WINDOWS = frozenset(
    {
        "drop",
        "duplicate",
        "delay",
        "reorder",
        "append_lost",
        "append_unanswered",
        "ack_lost",
        "call_failed",
        "slow_engine",
    }
)


@dataclass
class Report:
    """What one schedule came to."""

    seed: int
    violations: list[str]
    injected: Counter[str]
    updates: Counter[str]
    lost: int
    twice: int
    longest_over_s: float
    virtual_s: float
    digest: str
    """Of all that happened, in order: alike for the same scenario."""
    steps: dict[str, int]
    """How many boundaries each process passed."""
    trace: list[str] = field(default_factory=list[str])


class World:
    """Everything there is in one schedule."""

    def __init__(self, scenario: Scenario, folder: Path, *, tracing: bool) -> None:
        self.scenario = scenario
        self.loop = SimulatedLoop()
        self.loop.born = self._born
        self.loop.set_exception_handler(
            lambda _, context: self.witness.wrong(f"the loop says: {context['message']}")
        )
        self.witness = Witness(self.loop.time)
        self.injected: Counter[str] = Counter()
        self.longest_over_s = 0.0
        self.processes: dict[str, Process] = {}
        self._folder = folder
        self._tracing = tracing
        self._trace: list[str] = []
        self._sum = hashlib.sha256()
        self._skies = Skies(scenario, self.loop.time, self.injected)
        self.loop.disk_s = self._skies.disk_s
        self._activity = 0
        self._broker = WatchedBroker(self.stored, self.said)
        self._broker.fate = self._skies.fate
        self._broker.append_fate = self._skies.append_fate
        self._platters: dict[str, Platters] = {}
        self._engine_dies: Counter[str] = Counter()
        self._engine_steps: Counter[str] = Counter()
        self._offsets: Counter[str] = Counter()
        self._open: dict[str, tuple[float, Fields]] = {}
        self._disturbed_at = 0.0
        self._struck: set[int] = set()
        self._aggregators = 0
        self._operators = 0
        self._supervising: asyncio.TaskGroup
        self._model = folder / "model.gguf"
        self._rows = folder / "rows.jsonl"

    # ---- the run

    def run(self) -> Report:
        """The whole schedule, to its end."""
        random.seed(f"{self.scenario.seed} jitter")
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._all())
            virtual_s = self.loop.time()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            self.loop.close()
        updates = Counter(dict(self.witness.outcomes))
        updates["sent"] = sum(self.witness.sent.values())
        updates["measured"] = len(self.witness.spooled)
        return Report(
            seed=self.scenario.seed,
            violations=self.witness.violations,
            injected=self.injected,
            updates=updates,
            lost=len(self.witness.lost),
            twice=self.witness.twice,
            longest_over_s=self.longest_over_s,
            virtual_s=virtual_s,
            digest=self._sum.hexdigest(),
            steps={name: process.steps for name, process in self.processes.items()},
            trace=self._trace,
        )

    async def _all(self) -> None:
        self._model.write_text("{}")
        self._rows.write_text('{"text": "a", "label": "up"}\n' * 6)
        self.witness.round_opened = self._round_opened
        self.witness.round_closed = self._round_closed
        async with asyncio.TaskGroup() as group:
            self._supervising = group
            self._start("aggregator", self._aggregator)
            self._start("scheduler", self._scheduler)
            for name in self.scenario.names:
                self._platters[name] = Platters(random.Random(f"{self.scenario.seed} disk {name}"))
                self._platters[name].durable = self.witness.durable
                self._start(name, self._edge)
            mischief = [group.create_task(self._cause(one)) for one in self.scenario.faults]
            jobs = [group.create_task(self._operator(n)) for n in range(self.scenario.jobs)]
            watch = group.create_task(self._watch())
            await asyncio.wait({*mischief, *jobs})
            await self._struck_or_ended()
            self.note("world", "faults are over")
            for process in self.processes.values():
                process.kills.clear()
            self._engine_dies.clear()
            await self._settled()
            for process in self.processes.values():
                await process.end()
            watch.cancel()
        self._verify()

    async def _struck_or_ended(self) -> None:
        """Nothing that waits for a step of a process is left, or nothing takes steps any more."""
        latest = self.loop.time() + 60 * self.scenario.deadline_s
        while self.loop.time() < latest and not self.witness.violations:
            kills = any(process.kills for process in self.processes.values())
            deaths = any(self._engine_dies[n] > self._engine_steps[n] for n in self._engine_dies)
            if not (kills or deaths) or self._quiet():
                return
            await asyncio.sleep(LOOK_S)

    async def _settled(self) -> None:
        """Until nothing is left to be done, or patience ends."""
        deadline = self.loop.time() + PATIENCE_S
        while not self._quiet():
            if self.loop.time() > deadline:
                self.witness.wrong(f"not settled {PATIENCE_S:g} s after the last fault")
                return
            if self.witness.violations:
                return
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(LOOK_S)

    def _quiet(self) -> bool:
        jobs = self.witness.jobs.values()
        waiting = self._broker.streams.get(subjects.UPDATES_STREAM)
        return (
            len(jobs) == self.scenario.jobs
            and all(job.ended for job in jobs)
            and not any(platters.busy for platters in self._platters.values())
            and not (waiting and waiting.messages)
        )

    def _verify(self) -> None:
        witness = self.witness
        if witness.violations:
            return  # it was ended early: what is open is no fault
        for stream in (subjects.LOG_STREAM, subjects.DETAIL_STREAM):
            witness.prefix(stream, self._broker.streams[stream].messages)
        for name, platters in self._platters.items():
            held = [n.removesuffix(".update") for n in platters.names if n.endswith(".update")]
            whole = [*platters.replaced, platters.names["ledger.jsonl"].data]
            witness.ledger(name, b"".join(whole), held)
        witness.finished()
        stored = self._broker.streams[subjects.BLOBS_STREAM]
        kept = {one.subject.split(".")[-2] for one in stored.messages.values()}
        jobs = witness.jobs.values()
        allowed = {one for job in jobs for one in (*job.snapshots[-3:], *job.best[:2])}
        allowed |= {one for job in jobs for one in job.unmeasured}
        for name, job in witness.jobs.items():
            if lost := set(job.kept) - kept:
                witness.wrong(f"an epoch of job {name} began with {min(lost)}, which is gone")
        allowed |= witness.starts.keys()
        # A writer that is fenced off between a snapshot and its fact leaves one behind.
        if len(kept - allowed) > self.injected["fenced off"]:
            witness.wrong(f"{len(kept - allowed)} snapshots that nobody needs are still stored")
        for name, job in witness.jobs.items():
            if job.snapshots and job.snapshots[-1] not in kept:
                witness.wrong(f"the last snapshot of job {name} is not stored")
            if job.best and job.best[0] not in kept:
                witness.wrong(f"the best snapshot of job {name} is not stored")
        if self._broker.subscribers:
            left = sorted({one.pattern for one in self._broker.subscribers})
            witness.wrong(f"subscriptions outlived their processes: {left}")

    # ---- what the broker tells

    def stored(self, stream: str, sequence: int, subject: str, data: bytes) -> None:
        self._activity += 1
        self.note("broker", f"{stream} {sequence} {subject} {len(data)}", data)
        self.witness.stored(stream, sequence, subject, data)

    def said(self, subject: str, data: bytes) -> None:
        self._activity += 1
        self.witness.said(subject, data)

    def note(self, who: str, what: str, data: bytes = b"") -> None:
        line = f"{self.loop.time():.6f} {who}: {what}"
        self._sum.update(line.encode() + data)
        if self._tracing:
            self._trace.append(line)

    # ---- rounds over their bound

    def _round_opened(self, job: str, opened: Fields) -> None:
        self._open[job] = (self.loop.time(), opened)

    def _round_closed(self, job: str, opened: Fields) -> None:
        self._look(job)
        self._open.pop(job, None)

    def _look(self, job: str) -> None:
        since, opened = self._open[job]
        serving = [p.ready_at for p in self.processes.values() if p.ready_at is not None]
        if not serving or self._troubled():
            self._disturbed_at = self.loop.time()
        begun = max([since, self._disturbed_at, *serving])
        over_s = self.loop.time() - begun - opened["deadline_s"]
        self.longest_over_s = max(self.longest_over_s, over_s)
        if over_s > GRACE_S:
            self.witness.wrong(f"round {opened['round']} of job {job} is open {over_s:.1f} s over")

    def _troubled(self) -> bool:
        """Whether something keeps an aggregator from the broker."""
        cut = any(
            not client.connected
            for name, client in self._broker.clients.items()
            if name.startswith("aggregator")
        )
        now = self.loop.time()
        return cut or any(
            fault.who == "aggregator" and fault.at_s <= now < fault.at_s + fault.for_s + 5
            for fault in self.scenario.faults
            if fault.kind in WINDOWS
        )

    async def _watch(self) -> None:
        while True:
            for job in list(self._open):
                self._look(job)
            for name, platters in self._platters.items():
                if platters.size_bytes > self._spool_bytes(name) + UPDATE_BYTES:
                    self.witness.wrong(f"the spool of {name} holds {platters.size_bytes} bytes")
                self._look_at_ledger(name, platters)
            await asyncio.sleep(5.0)

    def _look_at_ledger(self, name: str, platters: Platters) -> None:
        """It is bounded: by its setting, or by twice what is held, and a few lines."""
        bound, ledger = self.scenario.ledger_bytes, platters.names.get("ledger.jsonl")
        if not bound or ledger is None or platters.full:
            return
        held = sum(file.endswith(".update") for file in platters.names)
        if len(ledger.data) > max(bound, 2 * LINE_BYTES * (held + 8)) + 8 * LINE_BYTES:
            self.witness.wrong(f"the ledger of {name} has grown to {len(ledger.data)} bytes")

    # ---- faults

    async def _cause(self, fault: Fault) -> None:
        """Let one fault happen at its time, and end."""
        if fault.at_step:
            if fault.kind == "engine_death":
                self._engine_dies[fault.who] = fault.at_step
            else:
                self.processes[fault.who].kills[fault.at_step] = fault
            return
        await asyncio.sleep(fault.at_s)
        process = self.processes.get(fault.who)
        match fault.kind:
            case "partition":
                self._inject(fault)
                if fault.who in self._broker.clients:
                    self._broker.partition(fault.who)
                await asyncio.sleep(fault.for_s)
                client = self._broker.clients.get(fault.who)
                if client is not None and process is not None and process.alive:
                    client.reconnected()
            case "terminate" if process is not None:
                self._inject(fault)
                process.terminate(fault.for_s)
                await asyncio.sleep(fault.for_s)
            case "broker_restart":
                self._inject(fault)
                self._disturbed_at = self.loop.time()
                self._broker.restart()
            case "second_aggregator":
                self._inject(fault)
                self._another_aggregator()
            case "stop_job":
                self._inject(fault)
                await self._asked(subjects.JOB_STOP, encode(StopJob(job=fault.who)))
            case "disk_full":
                self._inject(fault)
                self._platters[fault.who].full = True
                await asyncio.sleep(fault.for_s)
                self._platters[fault.who].full = False
            case "clock" if process is not None:
                self._inject(fault)
                self._offsets[fault.who] += int(fault.for_s)
                process.kill(1.0)  # a monotonic clock jumps at a boot alone
            case _:
                await asyncio.sleep(fault.for_s)

    def _inject(self, fault: Fault, where: str = "") -> None:
        if fault.number not in self._struck or where:
            self._struck.add(fault.number)
            self.injected[f"{fault.kind} {where}".strip()] += 1
            self.note("world", f"{fault.text()} {where}")

    def _strike(self, fault: Fault, step: str) -> None:
        self._inject(fault, f"at {step}")
        if fault.kind == "power_cut":
            self._platters[fault.who].power_cut()
        if fault.who == "aggregator":
            self._disturbed_at = self.loop.time()

    # ---- processes

    def _born(self, task: SimulatedTask) -> None:
        process = PROCESS.get()
        if process is not None:
            process.born(task)

    def _start(self, name: str, body: Callable[[Process], Awaitable[None]]) -> Process:
        process = Process(name, self._broker, self._skies, body, self.note)
        process.struck = self._strike
        process.crashed = lambda text: self.witness.wrong(f"{name}: {text}")
        self.processes[name] = process
        # In a context of its own: it belongs to no process that may have called for it.
        contextvars.Context().run(self._supervising.create_task, process.live())
        return process

    def _another_aggregator(self) -> None:
        self._aggregators += 1
        name = f"aggregator-{self._aggregators + 1}"
        process = self._start(name, self._aggregator)
        process.fenced = self._fenced

    def _fenced(self) -> None:
        """One aggregator says that another writes; where none is left, the operator starts one."""
        self._disturbed_at = self.loop.time()
        self.injected["fenced off"] += 1
        alive = [p for n, p in self.processes.items() if n.startswith("aggregator") and p.alive]
        if len(alive) <= 1:
            self._another_aggregator()

    async def _aggregator(self, process: Process) -> None:
        process.fenced = self._fenced
        settings = AggregatorSettings(batch=self.scenario.batch, report_every_s=3600.0)
        service = Aggregator(process.link, process.link, settings, self._clock(process.name))

        def ready() -> None:
            process.ready_at = self.loop.time()
            for name, state in service.jobs.items():
                job = self.witness.jobs[name]
                at_hand = state.begun and state.start is None  # it may not be to be had yet
                if at_hand and not state.ended and job.theta is not None:
                    digest = state.adapter.digest()
                    if digest not in {*job.digests.values(), *job.starts.values()}:
                        self.witness.wrong(f"a replay ends at another digest, {digest[:12]}")

        await service.serve(process.stop, ready)

    async def _scheduler(self, process: Process) -> None:
        settings = SchedulerSettings(report_every_s=3600.0, seed=self.scenario.seed)
        link = process.link
        await Scheduler(link, link, settings, self._clock(process.name)).serve(process.stop)

    async def _edge(self, process: Process) -> None:
        name = process.name
        number = self.scenario.names.index(name)
        trusted = number < self.scenario.trusted
        state = self._folder / name
        state.mkdir(exist_ok=True)
        settings = EdgeSettings(
            device=name,
            data=str(self._rows),
            heldout=str(self._rows) if trusted else "",
            trusted=trusted,
            state_dir=str(state),
            models=[str(self._model)],
            max_spool_bytes=self._spool_bytes(name),
        )
        disk = SimulatedDisk(self._platters[name], process.step)
        spool = Spool(
            state / "spool",
            max_bytes=settings.max_spool_bytes,
            max_ledger_bytes=self.scenario.ledger_bytes,
            disk=disk,
        )

        def probe_s() -> float:
            slow = 30.0 if self._skies.active(name, "slow_engine") else 1.0
            return self.scenario.probe_s[number] * slow

        def dies() -> bool:
            self._engine_steps[name] += 1
            if self._engine_steps[name] != self._engine_dies[name]:
                return False
            self.injected["engine_death"] += 1
            return True

        engine = EngineDouble(f"{name} {process.lives}", probe_s, dies, 6)
        clock = self._clock(name)
        await Edge(settings, process.link, process.link, spool, engine, clock).run(process.stop)

    def _spool_bytes(self, name: str) -> int:
        tight = name == self.scenario.names[-1] and self.scenario.spool_updates
        return self.scenario.spool_updates * UPDATE_BYTES if tight else 1 << 20

    def _clock(self, name: str) -> SimulatedClock:
        return SimulatedClock(self.loop, lambda: self._activity, self._offsets[name])

    # ---- the operator

    async def _operator(self, number: int) -> None:
        await asyncio.sleep(self._skies.uniform(0, 5) + 20 * number)
        name = f"job-{number}"
        while name not in self.witness.jobs or not self.witness.jobs[name].digests:
            await self._asked(
                subjects.JOB_SUBMIT, encode(a_job(self.scenario, number, self._model))
            )
            await asyncio.sleep(1.0)
        job = self.witness.jobs[name]
        while not job.ended and job.theta is not None and job.theta.epoch + 1 < job.spec["epochs"]:
            if job.waits:
                following = next_epoch(name, job.theta.manifest, job.theta.round, job.theta.theta)
                self.witness.starts[following.request.start.digest] = following.start
                await self._asked(
                    subjects.JOB_EPOCH, encode(following.request), blob=following.start
                )
            await asyncio.sleep(1.0)

    async def _asked(self, subject: str, data: bytes, *, blob: bytes = b"") -> None:
        """Somebody has answered; `blob` was in the store before."""
        self._operators += 1
        link = self._broker.connect(f"operator-{self._operators}")
        while True:
            try:
                if blob:
                    await blobs.put(link, blob)
                answer = await link.request(subject, data, timeout_s=10.0)
            except TransientError:
                await asyncio.sleep(2.0)
            else:
                self.note("operator", type(decode(answer, Message)).__name__)
                await link.close()
                return


def run(scenario: Scenario, *, tracing: bool = False) -> Report:
    """What a schedule comes to; alike every time."""
    state = random.getstate()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        return World(scenario, folder, tracing=tracing).run()
    finally:
        random.setstate(state)
        shutil.rmtree(folder)


def without(scenario: Scenario, number: int) -> Scenario:
    """The same scenario, less one fault."""
    faults = [fault for fault in scenario.faults if fault.number != number]
    return dataclasses.replace(scenario, faults=faults)


def shrunk(scenario: Scenario) -> tuple[Scenario, Report]:
    """As few of its faults as still break something, and what then happens."""
    for fault in scenario.faults:
        fewer = without(scenario, fault.number)
        if run(fewer).violations:
            scenario = fewer
    return scenario, run(scenario, tracing=True)
