"""What lateness costs: the demo's job with and without it, to the same held-out loss.

The demo's model, text and settings; each device's slopes by the engine's own job (llama.cpp, its
cached sites), each round by the aggregator's own state. What is simulated is time: in every round
each of the eight devices measures at the adapter that the round opens with, and a seed says when
its update comes. Clean: all come before the close, in the order that the seed says. Late: of each
hundred updates 30 come one to four rounds after, and 10 never; a round that so has less than
enough is closed by its deadline. Paired: both runs of a seed have the same directions and order.
The ratio is held-out loss after the last round, late over clean; below 1 lateness did no harm.
"""

import contextlib
import io
import random
import tempfile
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy.demo import build_data, families
from deploy.demo.__main__ import DEVICES, MODEL, ROUNDS
from services.aggregator.opening import open_job
from services.aggregator.state import JobState
from services.console.manifest import manifest
from services.console.spec import wanted
from shared.adapter import Adapter
from shared.codec import decode, encode, encode_manifest
from shared.engine.evaluating import evaluate
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine
from shared.engine.probing import probe
from shared.engine.protocol import Evaluate, OpenJob, Probe
from shared.messages import (
    BlobRef,
    JobOpened,
    JobSpec,
    LogEvent,
    Message,
    RoundClosed,
    SubmitJob,
    SubmitUpdate,
    UpdateKey,
    Variant,
)
from shared.messages.log import DetailEvent
from tests.bench.figure import Figure

SEEDS = 5
LATE, NEVER = 0.30, 0.10
LATEST_ROUNDS = 4
TARGET = 1.05


@dataclass(frozen=True)
class Weather:
    late: float
    never: float

    def delay(self, chance: random.Random) -> int | None:
        """How many rounds after its own an update comes; None: never."""
        drawn, rounds = chance.random(), chance.randint(1, LATEST_ROUNDS)
        if drawn < self.never:
            return None
        return rounds if drawn < self.never + self.late else 0


CLEAR, BAD = Weather(0.0, 0.0), Weather(LATE, NEVER)


@dataclass(frozen=True)
class Ran:
    """What one run came to; losses are nats a held-out row."""

    loss_before: float
    loss: float
    accuracy: float
    folded: int
    late: int
    too_late: int
    never: int


async def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        pairs = pairs_of(Path(folder))
    ratios = [bad.loss / clean.loss for clean, bad in pairs]
    arrived = sum(bad.folded + bad.late + bad.too_late + bad.never for _, bad in pairs)
    late = sum(bad.late + bad.too_late for _, bad in pairs)
    clean_loss = sum(clean.loss for clean, _ in pairs) / len(pairs)
    return [
        Figure("late.loss_ratio", sum(ratios) / len(ratios), "", target=TARGET),
        Figure("late.loss_ratio_worst", max(ratios), "", target=TARGET),
        Figure("late.loss", clean_loss * sum(ratios) / len(ratios), "nats", clean_loss),
        Figure("late.loss_before", pairs[0][0].loss_before, "nats", clean_loss),
        Figure("late.share_late", late / arrived, ""),
        Figure("late.share_never", sum(bad.never for _, bad in pairs) / arrived, ""),
        Figure(
            "late.accuracy",
            sum(bad.accuracy for _, bad in pairs) / len(pairs),
            "",
            sum(clean.accuracy for clean, _ in pairs) / len(pairs),
        ),
    ]


def pairs_of(
    folder: Path, seeds: int = SEEDS, rounds: int = ROUNDS["exact"], how: str = "exact"
) -> list[tuple[Ran, Ran]]:
    """A clean and a late run for each seed."""
    with contextlib.redirect_stdout(io.StringIO()):
        build_data.main(["--out", str(folder)])
    spec = _spec(how, rounds)
    fleet = _Fleet(folder, spec)
    return [(run(fleet, seed, CLEAR), run(fleet, seed, BAD)) for seed in range(1, seeds + 1)]


class _Fleet:
    """The devices' engines, each with its text; what a row costs the model is paid once."""

    def __init__(self, folder: Path, spec: JobSpec) -> None:
        self.spec = spec
        self._folder = folder
        labels = list(spec.task.labels.values())
        self._facts = LlamaEngine().inspect(str(MODEL), labels, spec.task.template)
        given = self.manifest(seed=0)
        self.names = [f"device-{number}" for number in range(1, DEVICES + 1)]
        self.jobs = {name: self._job(name, given) for name in self.names}
        self.judge = self._job("judge", given)

    def manifest(self, seed: int) -> bytes:
        options = wanted({}, _file("exact")).adapter
        made = manifest(
            self._facts,
            options,
            labels=self.spec.task.labels,
            variant=Variant("0" * 64, MODEL.stat().st_size, MODEL.name),
            seed=seed,
            momentum=self.spec.tuning.momentum > 0,
        )
        return encode_manifest(made)

    def begin(self, given: bytes) -> None:
        """Everybody stands at theta = 0 of this manifest."""
        for job in (*self.jobs.values(), self.judge):
            job.adapter = Adapter.fresh(given)

    def apply(self, closed: RoundClosed) -> None:
        for job in (*self.jobs.values(), self.judge):
            job.adapter.apply(closed.round, closed.commit)
            assert job.adapter.digest() == closed.digest

    def _job(self, name: str, given: bytes) -> Job:
        rows = self._folder / "devices" / f"{name}.jsonl"
        heldout = self._folder / "heldout.jsonl" if name == "judge" else ""
        request = OpenJob(
            job="demo",
            manifest=given,
            task=self.spec.task,
            model=str(MODEL),
            data="" if heldout else str(rows),
            heldout=str(heldout),
            device=name,
        )
        return Job(request, LlamaEngine())


def _file(how: str) -> dict[str, object]:
    return tomllib.loads((MODEL.parents[1] / f"{how}.toml").read_text(encoding="utf-8"))


def _spec(how: str, rounds: int) -> JobSpec:
    labels = {name: name for name in families.FAMILIES}
    task = {"template": families.PROMPT_TEMPLATE, "labels": labels}
    return wanted({"task": task, "tuning": {"rounds": rounds}}, _file(how)).spec


class _Aggregator:
    """The aggregator's state, fed through its own wire format; logs to nobody."""

    def __init__(self, spec: JobSpec, given: bytes, closed: list[RoundClosed]) -> None:
        self._closed = closed
        self._sequence = 0
        opening = open_job(SubmitJob(job="demo", spec=spec, manifest=given))
        assert isinstance(opening[0], JobOpened)
        self.state = JobState(opening[0])
        for event in opening:
            self._evolve(event)
        self.go_on()

    def take(self, update: SubmitUpdate) -> str:
        """What becomes of one update; the round closes if it was enough."""
        event, outcomes = self.state.decide_updates([decode(encode(update), SubmitUpdate)])
        if event is not None:
            self._evolve(event)
        self.go_on()
        return outcomes[0].word

    def deadline(self) -> None:
        for event in self.state.decide_close(overdue=True):
            self._evolve(event)
        self.go_on()

    def go_on(self) -> None:
        while True:
            if self.state.snapshot_due and self.state.open is None:
                self._evolve(self.state.decide_published(BlobRef("0" * 64, 1)))
            events = self.state.decide_next()
            for event in events:
                self._evolve(event)
            if not events:
                return

    def _evolve(self, event: LogEvent | DetailEvent) -> None:
        self._sequence += 1
        logged = decode(encode(event), Message)
        assert isinstance(logged, LogEvent | DetailEvent)
        self.state.evolve(logged, self._sequence)
        if isinstance(logged, RoundClosed):
            self._closed.append(logged)


def run(fleet: _Fleet, seed: int, weather: Weather) -> Ran:
    """One job from its beginning to its end."""
    given = fleet.manifest(seed)
    fleet.begin(given)
    # All of a round's devices are waited for: else the fastest six would close each clean round.
    pacing = msgspec.structs.replace(
        fleet.spec.pacing,
        enough_devices=DEVICES,
        enough_probes=DEVICES * fleet.spec.tuning.directions,
    )
    spec = msgspec.structs.replace(fleet.spec, pacing=pacing)
    spec = msgspec.structs.replace(
        spec, evaluation=msgspec.structs.replace(spec.evaluation, every_rounds=0)
    )
    closed: list[RoundClosed] = []
    aggregator = _Aggregator(spec, given, closed)
    order, delays = random.Random(f"order {seed}"), random.Random(f"delays {seed}")
    coming: defaultdict[int, list[SubmitUpdate]] = defaultdict(list)
    words: defaultdict[str, int] = defaultdict(int)
    before, _ = _judged(fleet)
    applied = 0
    while (opened := aggregator.state.open) is not None:
        now = opened.commits
        for name in order.sample(fleet.names, len(fleet.names)):
            delay = weather.delay(delays)
            if delay is None:
                words["never"] += 1
                continue
            request = Probe(
                job="demo",
                round=opened.round,
                stream_round=opened.stream_round,
                how=opened.how,
                ranges=[(0, opened.directions)],
                eps=opened.eps,
                batch_rows=opened.batch_rows,
                scope=opened.scope,
                digest=opened.digest,
            )
            key = UpdateKey("demo", opened.epoch, opened.round, name, 0)
            result = probe(fleet.jobs[name], request)
            update = SubmitUpdate(key=key, digest=opened.digest, result=result, work_s=1.0)
            coming[now + delay].append(update)
        for update in sorted(coming.pop(now, []), key=lambda one: one.key.round):
            words[aggregator.take(update)] += 1
        if aggregator.state.open is opened:
            aggregator.deadline()
        for event in closed[applied:]:
            fleet.apply(event)
        applied = len(closed)
    words["too_late"] += sum(map(len, coming.values()))
    loss, accuracy = _judged(fleet)
    return Ran(
        before, loss, accuracy, words["folded"], words["late"], words["too_late"], words["never"]
    )


def _judged(fleet: _Fleet) -> tuple[float, float]:
    """Held-out loss, nats a row, and accuracy where the judge stands."""
    told = evaluate(fleet.judge, Evaluate(job="demo", digest=fleet.judge.adapter.digest()))
    return told.loss / told.weight, told.correct / told.examples
