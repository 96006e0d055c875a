"""One schedule of real processes: a fleet, its faults, a calm job after them, and the verdict."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import nats.errors
from msgspec.structs import replace

from shared import nats_bus, subjects
from shared.broker import BrokerProcess
from shared.codec import decode, encode
from shared.errors import TransientError
from shared.messages import JobEnded, Message, Refused, SubmitJob
from tests.chaos.live.daemons import Daemon, log_tail
from tests.chaos.live.namespaces import Namespace, Unavailable, a_namespace
from tests.chaos.live.plan import Blow, Plan
from tests.chaos.live.recording import Copy, Recorder, copied
from tests.chaos.live.verdict import GRACE_S, judged, longest_over_s
from tests.chaos.live.wire import TROUBLES, Wire
from tests.chaos.witness import Witness
from tests.chaos.world import Report
from tests.support.fleet import Fleet, a_spec, rows, write_rows

JOB_S = 90.0
"""Within this a job ends, whatever happens to its fleet."""
SETTLED_S = 60.0
"""Within this, when all is well again, every spool is empty and all stand at one digest."""
CALM_DEADLINE_S = 15.0
CABLE = ("unplug", "netem")
BROKER_LINKS = ("aggregator", "rival")


async def run(plan: Plan, folder: Path) -> Report:
    """The whole schedule, below a folder that is there; its processes have ended."""
    async with AsyncExitStack() as stack:
        return await _Schedule(plan, folder, stack).run()


class _Schedule:
    def __init__(self, plan: Plan, folder: Path, stack: AsyncExitStack) -> None:
        self.plan = plan
        self.folder = folder
        self.stack = stack
        self.broker = BrokerProcess(folder / "nats")
        self.recorder = Recorder()
        self.copies: list[Copy] = []
        self.injected: Counter[str] = Counter()
        self.daemons: dict[str, Daemon] = {}
        self.wires: dict[str, Wire] = {}
        self.namespaces: dict[str, Namespace] = {}
        self.outages: list[tuple[int, int]] = []
        self.began = time.monotonic()
        self.witness = Witness(lambda: time.monotonic() - self.began)
        self.fleet: Fleet
        self.living: asyncio.TaskGroup

    async def run(self) -> Report:
        await self.broker.start()
        self.stack.push_async_callback(self.broker.stop)
        model = self.folder / "model.json"
        model.write_text(json.dumps({"delay_s": self.plan.delay_s}), encoding="utf-8")
        bus = await nats_bus.connect([self.broker.url], name="bystander")
        self.stack.push_async_callback(bus.close)
        self.fleet = Fleet(self.folder, self.broker, bus, model)
        await self._enclose()
        async with asyncio.TaskGroup() as self.living:
            listening = [
                self.living.create_task(self.recorder.hear(bus)),
                self.living.create_task(self.fleet.hear()),
            ]
            try:
                await self._play()
            finally:
                for daemon in list(self.daemons.values()):
                    await daemon.end()
                for wire in self.wires.values():
                    await wire.stop()
                for task in listening:
                    task.cancel()
        return await self._report()

    async def _play(self) -> None:
        for name in ("aggregator", "scheduler", *self.plan.devices):
            await self._start(name)
        submitted = await self._submit("storm", self.plan.rounds, self.plan.deadline_s)
        if not submitted:
            return
        async with asyncio.TaskGroup() as blows:
            for blow in self.plan.blows:
                blows.create_task(self._strike(blow))
            ended = await self._ended("storm")
        for daemon in self.daemons.values():
            daemon.spare()
        await self._cleared()
        if ended and await self._submit("calm", 2, CALM_DEADLINE_S):
            await self._alike(await self._ended("calm"))

    # ---- the fleet

    async def _enclose(self) -> None:
        """Whose packets are to be disturbed has a network of its own, where the kernel allows."""
        for name in {blow.who for blow in self.plan.blows if blow.kind in CABLE}:
            with suppress(Unavailable):
                namespace = a_namespace(self.plan.seed)
                self.namespaces[name] = await self.stack.enter_async_context(namespace)

    async def _start(self, name: str, program: str = "") -> None:
        at = self.namespaces.get(name)
        wire = self.wires[name] = Wire(self.broker.port, at.host if at else "127.0.0.1")
        await wire.start()
        program = program or (name if name in ("aggregator", "scheduler") else "edge")
        arguments = [program, "--servers", wire.url]
        if program == "aggregator":
            arguments += ["--batch", str(self.plan.batch)]
        elif program == "edge":
            arguments += self._edge_arguments(name)
        daemon = self.daemons[name] = Daemon(
            name,
            arguments,
            self.folder,
            kills=self.plan.kills.get(name, ()),
            mutation=self.plan.mutation.get(name, ""),
            namespace=at.name if at else "",
            wrong=self.witness.wrong,
            died=self._copy if name in BROKER_LINKS else None,
        )
        self.living.create_task(daemon.live())

    def _edge_arguments(self, name: str) -> list[str]:
        number = self.plan.devices.index(name)
        data = write_rows(self.folder / f"{name}.jsonl", rows(40, offset=40 * number))
        arguments = ["--device", name, "--engine", "fake", "--data", str(data)]
        arguments += ["--models", str(self.fleet.model), "--max-ledger-bytes", "0"]
        arguments += ["--state-dir", str(self.folder / "state" / name)]
        if number == 0:
            heldout = write_rows(self.folder / "heldout.jsonl", rows(60, offset=100_000))
            arguments += ["--trusted", "true", "--heldout", str(heldout)]
        return arguments

    async def _submit(self, name: str, rounds: int, deadline_s: float) -> bool:
        """Whether the job is open; an answer may be lost with the process that gave it."""
        job = self._job(name, rounds, deadline_s)
        latest = time.monotonic() + JOB_S
        while time.monotonic() < latest:
            try:
                data = await self.fleet.bus.request(subjects.JOB_SUBMIT, encode(job), timeout_s=2)
            except TransientError:
                await asyncio.sleep(0.05)
                continue
            answer = decode(data, Message)
            if not isinstance(answer, Refused) or "exists already" in answer.reason:
                return True
            self.witness.wrong(f"job {name} was refused: {answer.reason}")
            return False
        self.witness.wrong(f"nobody took job {name} within {JOB_S:g} s")
        return False

    def _job(self, name: str, rounds: int, deadline_s: float) -> SubmitJob:
        plan, calm = self.plan, name == "calm"
        usual = a_spec(
            rounds,
            how="exact" if calm else plan.how,
            deadline_s=deadline_s,
            enough_devices=len(plan.devices) if calm else plan.enough_devices,
        )
        spec = replace(
            usual,
            tuning=replace(usual.tuning, momentum=plan.momentum),
            pacing=replace(usual.pacing, lateness_rounds=plan.lateness_rounds),
            evaluation=replace(usual.evaluation, every_rounds=3),
            snapshot_every=plan.snapshot_every,
        )
        return self.fleet.job(name, spec)

    async def _ended(self, name: str) -> JobEnded | None:
        try:
            async with asyncio.timeout(JOB_S):
                events = await self.fleet.events_until(name)
        except TimeoutError:
            self.witness.wrong(f"job {name} did not end within {JOB_S:g} s")
            return None
        end = events[-1]
        return end if isinstance(end, JobEnded) else None

    # ---- what goes wrong

    async def _strike(self, blow: Blow) -> None:
        await asyncio.sleep(blow.at_s)
        if blow.kind in CABLE:
            await self._disturb(blow)
            return
        self.injected[f"{blow.kind} {_role(blow.who)}"] += 1
        daemon = self.daemons.get(blow.who)
        began = time.time_ns()
        if blow.who == "broker":
            await self._copy()
            await self.broker.kill()
            await asyncio.sleep(blow.for_s)
            await self.broker.start()
        elif blow.kind == "second_aggregator":
            await self._start("rival", "aggregator")
        elif blow.kind in TROUBLES:
            await self.wires[blow.who].suffer(blow.kind, blow.for_s)
        elif daemon is not None and blow.kind == "kill":
            await daemon.kill(blow.for_s)
        elif daemon is not None and blow.kind == "terminate":
            daemon.terminate()
        elif daemon is not None:
            await daemon.freeze(blow.for_s)
        if blow.who in ("broker", *BROKER_LINKS):
            self.outages.append((began, time.time_ns()))

    async def _disturb(self, blow: Blow) -> None:
        """What a kernel cannot do is skipped, and said."""
        namespace = self.namespaces.get(blow.who)
        if namespace is None:
            self.injected["skipped for want of namespaces"] += 1
        elif blow.kind == "unplug":
            await namespace.unplug(blow.for_s)
            self.injected["unplug edge"] += 1
        else:
            try:
                await namespace.disturb(blow.for_s)
                self.injected["netem edge"] += 1
            except Unavailable:
                self.injected["skipped for want of netem"] += 1

    async def _cleared(self) -> None:
        """Every link is whole and new, so that whoever waits to send again sends now."""
        for wire in self.wires.values():
            await wire.suffer("cut", 0.0)

    async def _copy(self) -> None:
        """The streams as they are now, if the broker is there."""
        try:
            self.copies.append(await copied(self.broker.url))
        except (OSError, nats.errors.Error, TimeoutError):
            self.injected["kill while the broker is down"] += 1

    # ---- at the end

    async def _alike(self, end: JobEnded | None) -> None:
        """Every device stands where the calm job has ended, and has nothing left to settle."""
        if end is None:
            return
        latest = time.monotonic() + SETTLED_S
        while set(self._ends().values()) != {end.digest} or self._held():
            if time.monotonic() > latest:
                self.witness.wrong(
                    f"not settled: all at {end.digest[:12]}: {self._ends()}; held {self._held()}"
                )
                return
            await asyncio.sleep(0.05)

    def _ends(self) -> dict[str, str]:
        """Where each device says that it stands in the calm job."""
        positions = self.fleet.positions
        return {
            name: positions.get(f"calm/{name}", "").split(":")[-1] for name in self.plan.devices
        }

    def _held(self) -> list[str]:
        return [path.name for path in (self.folder / "state").glob("*/spool/*.update")]

    async def _report(self) -> Report:
        plan, witness = self.plan, self.witness
        final = await copied(self.broker.url)
        for name, daemon in self.daemons.items():
            self.outages += daemon.outages if name in BROKER_LINKS else []
            for what in daemon.boundaries:
                self.injected[f"kill {_role(name)} at {what}"] += 1
        fenced = [name for name in BROKER_LINKS if name in self.daemons]
        if all(self.daemons[name].fenced for name in fenced):
            witness.wrong("every aggregator has given up the log to another")
        spools = {name: self.folder / "state" / name / "spool" for name in plan.devices}
        kept = [self.daemons[name].kept for name in plan.devices if name in self.daemons]
        judged(witness, final, self.copies, self.recorder, kept, spools)
        over_s = longest_over_s(final, self.outages)
        if over_s > GRACE_S:
            witness.wrong(f"a round was open {over_s:.1f} s over its bound")
        updates = Counter(dict(witness.outcomes))
        updates["sent"] = sum(witness.sent.values())
        updates["measured"] = len(witness.spooled)
        return Report(
            seed=plan.seed,
            violations=witness.violations,
            injected=self.injected,
            updates=updates,
            lost=len(witness.lost),
            twice=witness.twice,
            longest_over_s=over_s,
            virtual_s=time.monotonic() - self.began,
            digest=_digest(final),
            steps={name: daemon.lives for name, daemon in self.daemons.items()},
            trace=log_tail(self.folder).splitlines() if witness.violations else [],
        )


def _digest(final: Copy) -> str:
    """Of all that was logged."""
    sha = hashlib.sha256()
    for entries in final.values():
        for entry in entries:
            sha.update(entry.data)
    return sha.hexdigest()


def _role(name: str) -> str:
    return "edge" if name.startswith("d") else "aggregator" if name == "rival" else name
