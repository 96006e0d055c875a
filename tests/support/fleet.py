"""A whole fleet for tests and benchmarks: real processes, a real broker, the fake engine."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.demo.processes import Child
from shared import nats_bus, subjects
from shared.broker import BrokerProcess, start_broker
from shared.codec import decode, encode, encode_manifest
from shared.engine.fake import OUTPUT, FakeEngine
from shared.errors import TransientError
from shared.log import follow
from shared.messages import (
    Block,
    DeviceReport,
    Evaluation,
    JobAccepted,
    JobEnded,
    JobSpec,
    LogEvent,
    Manifest,
    Message,
    Pacing,
    SubmitJob,
    Task,
    Tuning,
    Variant,
)
from shared.messages.jobs import How

LABELS = {"fruit": "apple", "metal": "iron"}
WORDS = {
    "fruit": ("sweet ripe juicy tree orchard peel seed", "pear plum cherry grape lemon fig"),
    "metal": ("hard shiny forge ore mine smelt alloy", "zinc copper nickel lead tin silver"),
}


def rows(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Rows that a bag of words can learn, alike for the same arguments."""
    found: list[dict[str, str]] = []
    for number in range(offset, offset + count):
        label = ("fruit", "metal")[number % 2]
        adjectives, nouns = (words.split() for words in WORDS[label])
        text = f"{adjectives[number % 7]} {nouns[number % 6]} number{number}"
        found.append({"text": text, "label": label})
    return found


def write_rows(path: Path, found: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


@dataclass
class Fleet:
    """Services and devices below `folder`, and a bus of one's own."""

    folder: Path
    broker: BrokerProcess
    bus: nats_bus.NatsBus
    model: Path
    services: dict[str, Child] = field(default_factory=dict[str, Child])
    devices: dict[str, Child] = field(default_factory=dict[str, Child])
    positions: dict[str, str] = field(default_factory=dict[str, str])
    unable: dict[str, str] = field(default_factory=dict[str, str])
    hearing: asyncio.Task[None] | None = None
    addresses: list[str] = field(default_factory=list[str])
    """Of a cluster's servers; if there are none, the broker's."""

    @property
    def servers(self) -> list[str]:
        return self.addresses or [self.broker.url]

    async def start_service(self, name: str, *more: str) -> Child:
        child = Child(
            name,
            f"services.{name}",
            ["--servers", *self.servers, *more],
            self.folder / f"{name}.log",
        )
        self.services[name] = child
        await child.start()
        return child

    async def start_device(self, name: str, *, url: str = "", trusted: bool = False) -> Child:
        number = len(self.devices)
        data = write_rows(self.folder / f"{name}.jsonl", rows(40, offset=40 * number))
        servers = [url] if url else self.servers
        arguments = ["--device", name, "--servers", *servers, "--engine", "fake"]
        arguments += ["--data", str(data), "--state-dir", str(self.folder / "state" / name)]
        arguments += ["--models", str(self.model)]
        if trusted:
            heldout = write_rows(self.folder / "heldout.jsonl", rows(60, offset=100_000))
            arguments += ["--heldout", str(heldout), "--trusted", "true"]
        child = Child(name, "edge_client", arguments, self.folder / f"{name}.log")
        self.devices[name] = child
        await child.start()
        return child

    def job(self, name: str, spec: JobSpec, blocks: list[Block] | None = None) -> SubmitJob:
        """A job on the fake model; `blocks` are its label words' rows if none are given."""
        facts = FakeEngine().inspect(str(self.model), list(LABELS.values()), spec.task.template)
        found = blocks or [
            Block("output_rows", OUTPUT, [len(facts.tokens), facts.n_embd], rows=facts.tokens)
        ]
        d = sum(block.shape[0] * (block.shape[1] if block.shape[1:] else 1) for block in found)
        digest = hashlib.sha256(self.model.read_bytes()).hexdigest()
        manifest = Manifest(
            epoch=0,
            architecture=facts.architecture,
            seed=7,
            blocks=found,
            variants=[Variant(digest, self.model.stat().st_size, self.model.name)],
            d=d,
            update_rule="momentum" if spec.tuning.momentum else "plain",
        )
        return SubmitJob(job=name, spec=spec, manifest=encode_manifest(manifest))

    async def submit(self, job: SubmitJob) -> Message:
        """The aggregator's answer, waited for while it starts."""
        while True:
            try:
                answer = await self.bus.request(subjects.JOB_SUBMIT, encode(job), timeout_s=10)
            except TransientError:
                await asyncio.sleep(0.05)
            else:
                message = decode(answer, Message)
                assert isinstance(message, JobAccepted), message
                return message

    async def facts(self, job: str) -> AsyncGenerator[LogEvent, None]:
        """The job's facts, old and new."""
        async with aclosing(follow(self.bus, self.bus, job, check_s=2.0)) as events:
            async for _, event in events:
                yield event

    async def events_until(
        self,
        job: str,
        ended: Callable[[LogEvent], bool] = lambda event: isinstance(event, JobEnded),
    ) -> list[LogEvent]:
        """The job's facts up to the first that `ended` is true of."""
        found: list[LogEvent] = []
        async with aclosing(self.facts(job)) as events:
            async for event in events:
                found.append(event)
                if ended(event):
                    break
        return found

    async def hear(self) -> None:
        """Keep what devices say of themselves, until cancelled."""
        async with self.bus.subscribe(subjects.ALL_REPORTS) as deliveries:
            async for delivery in deliveries:
                report = decode(delivery.data, DeviceReport)
                for job, why in report.unable.items():
                    self.unable[f"{job}/{report.device}"] = why
                for job, position in report.positions.items():
                    self.positions[f"{job}/{report.device}"] = position

    def ledgers(self) -> list[Path]:
        return sorted((self.folder / "state").glob("*/**/ledger.jsonl"))

    def logs(self) -> str:
        """Everything that its processes logged, for a failing test's report."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


@asynccontextmanager
async def fleet_on(
    broker: BrokerProcess,
    folder: Path,
    *,
    servers: list[str] | None = None,
    service_options: tuple[str, ...] = (),
    model: dict[str, object] | None = None,
) -> AsyncGenerator[Fleet, None]:
    """Aggregator and scheduler on a broker that runs; whatever the fleet has ends with the block.

    `model` are the fake engine's options.
    """
    path = folder / "model.json"
    path.write_text(json.dumps(model or {}))
    addresses = servers or []
    bus = await nats_bus.connect(addresses or [broker.url], name="test")
    fleet = Fleet(folder, broker, bus, path, addresses=addresses)
    fleet.hearing = hearing = asyncio.create_task(fleet.hear())
    try:
        for name in ("aggregator", "scheduler"):
            await fleet.start_service(name, *service_options)
        yield fleet
    finally:
        for child in [*fleet.devices.values(), *fleet.services.values()]:
            await child.stop()
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        await bus.close()


@asynccontextmanager
async def a_fleet(
    folder: Path, *, devices: int, model: dict[str, object] | None = None
) -> AsyncGenerator[Fleet, None]:
    """A broker, the three services and devices `d0` ... (d0 is trusted); all end with the block."""
    async with (
        start_broker(folder / "nats") as broker,
        fleet_on(broker, folder, model=model) as fleet,
    ):
        await fleet.start_service("telemetry", "--port", "0")
        for number in range(devices):
            await fleet.start_device(f"d{number}", trusted=number == 0)
        yield fleet


def a_task() -> Task:
    return Task(loss="choices", template="{text} is", labels=LABELS)


def a_spec(
    rounds: int, *, how: How = "exact", deadline_s: float = 5.0, enough_devices: int = 2
) -> JobSpec:
    return JobSpec(
        task=a_task(),
        tuning=Tuning(
            how=how,
            rounds=rounds,
            directions=64,
            batch_rows=1000,
            normalise="rms",
            step=0.3,
            eps=0.05,
        ),
        pacing=Pacing(enough_devices=enough_devices, enough_probes=64, deadline_s=deadline_s),
        evaluation=Evaluation(every_rounds=5),
        snapshot_every=5,
    )
