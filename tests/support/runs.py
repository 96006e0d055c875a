"""One job of the aggregator with its two streams in lists: the service without a bus."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.aggregator.folding import Outcome
from services.aggregator.opening import open_job
from services.aggregator.state import JobState
from shared.adapter import Adapter, next_epoch
from shared.blobs import reference
from shared.codec import encode_manifest
from shared.messages import (
    DetailEvent,
    JobOpened,
    LogEvent,
    OpenEpoch,
    RoundClosed,
    RoundOpened,
    SubmitJob,
    SubmitUpdate,
)
from tests.support.jobs import a_probe, an_evaluation


@dataclass
class Run:
    """A JobState with its two streams in lists: the service without a bus."""

    submit: SubmitJob
    log: list[LogEvent] = field(default_factory=list[LogEvent])
    detail: list[DetailEvent] = field(default_factory=list[DetailEvent])
    history: list[tuple[str, LogEvent | DetailEvent]] = field(
        default_factory=list[tuple[str, LogEvent | DetailEvent]]
    )
    """Both streams in the order in which they were written."""
    sent: list[SubmitUpdate] = field(default_factory=list[SubmitUpdate])
    blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """What the store has for epochs to start with, by digest."""
    state: JobState = field(init=False)

    def __post_init__(self) -> None:
        events = open_job(self.submit)
        assert isinstance(events[0], JobOpened)
        self.state = JobState(events[0])
        for event in events:
            self._log(event)
        self.settle()

    def _log(self, event: LogEvent) -> None:
        self.log.append(event)
        self.history.append(("log", event))
        self.state.evolve(event, len(self.log))

    def _detail(self, event: DetailEvent) -> None:
        self.detail.append(event)
        self.history.append(("detail", event))
        self.state.evolve(event, len(self.detail))

    def settle(self) -> None:
        while True:
            due = self.state.snapshot_due and self.state.open is None
            if due:
                self._log(self.state.decide_published(reference(self.state.adapter.to_bytes())))
            events = self.state.decide_next()
            for event in events:
                if isinstance(event, DetailEvent):
                    self._detail(event)
                else:
                    self._log(event)
            if not (events or due):
                return

    def send(self, *updates: SubmitUpdate) -> list[Outcome]:
        self.sent += updates
        event, outcomes = self.state.decide_updates(updates)
        if event is not None:
            self._detail(event)
        self.settle()
        return outcomes

    def next_epoch(self) -> OpenEpoch:
        """A request that the waiting job can be asked, with its blobs in the store."""
        before = self.state.adapter
        manifest = encode_manifest(next_epoch(before.manifest))
        start = Adapter.placed(manifest, before.round, before.theta // 2).to_bytes()
        anchor = Adapter.placed(manifest, before.round, before.theta // 3).to_bytes()
        request = OpenEpoch(
            job=self.submit.job,
            manifest=manifest,
            start=reference(start),
            anchor=reference(anchor),
        )
        self.blobs |= {request.start.digest: start, reference(anchor).digest: anchor}
        return request

    def open_epoch(self, request: OpenEpoch) -> None:
        start = self.blobs[request.start.digest]
        anchor = None if request.anchor is None else self.blobs[request.anchor.digest]
        self._log(self.state.decide_epoch(request, start, anchor))
        self.state.begin(start)
        self.settle()

    def overdue(self) -> None:
        for event in self.state.decide_close(overdue=True):
            self._log(event)
        self.settle()

    @property
    def opened(self) -> RoundOpened:
        assert self.state.open is not None
        return self.state.open

    def closes(self) -> list[RoundClosed]:
        return [event for event in self.log if isinstance(event, RoundClosed)]

    def restarted(self) -> "Run":
        """What a new process makes of the same streams, LOG first as the service does."""
        return self._twin(
            [*(("log", event) for event in self.log), *(("detail", event) for event in self.detail)]
        )

    def cut(self, facts: int) -> "Run":
        """What a new process makes of the first `facts` of both streams, two at least."""
        return self._twin(self.history[: max(2, facts)])

    def opened_rounds(self) -> list[RoundOpened]:
        return [event for event in self.log if isinstance(event, RoundOpened)]

    def _twin(self, history: list[tuple[str, LogEvent | DetailEvent]]) -> "Run":
        twin = object.__new__(Run)
        twin.submit, twin.sent, twin.history = self.submit, [], list(history)
        twin.blobs = self.blobs
        twin.log = [event for _, event in history if isinstance(event, LogEvent)]
        twin.detail = [event for _, event in history if isinstance(event, DetailEvent)]
        assert isinstance(self.log[0], JobOpened)
        twin.state = JobState(self.log[0])
        for number, event in enumerate(twin.log):
            twin.state.evolve(event, number + 1)
        if twin.state.start is not None:
            twin.state.begin(self.blobs[twin.state.start.digest])
        for number, event in enumerate(twin.detail):
            twin.state.evolve(event, number + 1)
        return twin


def words(outcomes: list[Outcome]) -> list[str]:
    return [outcome.word for outcome in outcomes]


def measured_run(figures: Sequence[tuple[int, float]], submit: SubmitJob) -> Run:
    """A job measured as it begins and after each round, with two devices, until figures run out.

    Each figure is (right answers, summed loss) of 100 examples.
    """
    run = Run(submit)
    for correct, loss in figures:
        if run.state.open is None:
            break
        opened = run.opened
        run.send(an_evaluation(opened, "trusted", correct=correct, loss=loss))
        if opened.kind == "tune":
            moved(run)
    return run


def moved(run: Run) -> None:
    """Two devices answer the open round, which closes."""
    run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
