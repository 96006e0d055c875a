"""Messages that nobody should send: the codec refuses them, and what it lets in harms no state."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.aggregator.opening import open_job
from services.aggregator.state import JobState
from services.scheduler.state import State as Scheduled
from services.telemetry.metrics import exposition
from services.telemetry.state import State as Observed
from services.telemetry.view import everything
from shared.codec import decode, encode
from shared.errors import MalformedMessage
from shared.messages import (
    DeviceReport,
    EvaluateResult,
    JobOpened,
    Message,
    ProbeResult,
    RequestWork,
    RoundClosed,
    RoundReport,
    SubmitUpdate,
    UpdateKey,
    UpdateSettled,
    UpdatesFolded,
    WorkAssigned,
)
from tests.chaos.abuse import poison
from tests.support.facts import device_report
from tests.support.jobs import a_job, a_probe

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
A_LOT = settings(max_examples=20, deadline=None, suppress_health_check=SLOW, database=None)
EACH = pytest.mark.parametrize("kind", poison.KINDS, ids=lambda kind: kind.__name__)


@EACH
@given(data=st.data())
@A_LOT
def test_what_the_schema_allows_is_read_and_written_again(
    kind: type[Message], data: st.DataObject
) -> None:
    message = decode(poison.pack(data.draw(poison.messages(kind))), kind)
    assert decode(encode(message), kind) == message


@EACH
@given(data=st.data())
@A_LOT
def test_a_message_with_something_wrong_in_it_is_malformed_at_worst(
    kind: type[Message], data: st.DataObject
) -> None:
    mangled = st.one_of(poison.spoiled(kind).map(poison.pack), poison.mangled(kind))
    try:
        message = decode(data.draw(mangled), Message)
    except MalformedMessage:
        return
    assert decode(encode(message), Message) == message


# ---- what the schema allows, and the states behind it


class Services:
    """The states of all services on one log, which takes only what its readers can read."""

    def __init__(self, *, momentum: int = 0) -> None:
        job = a_job(enough_probes=16, evaluate_every=1, momentum=momentum)
        opening = open_job(job)
        assert isinstance(opening[0], JobOpened)
        self.aggregator = JobState(opening[0])
        self.scheduler = Scheduled(idle_comeback_s=60.0, seed=1)
        self.telemetry = Observed()
        self.closed: list[RoundClosed] = []
        self._sequence = 0
        for event in opening:
            self._log(event)
        self.go_on()

    def _log(self, event: Any) -> None:
        self._sequence += 1
        logged: Any = decode(encode(event), Message)
        self.aggregator.evolve(logged, self._sequence)
        self.scheduler.evolve(logged, float(self._sequence))
        match logged:
            case RoundReport():
                self.telemetry.on_round_report(logged)
            case UpdatesFolded():
                self.telemetry.on_updates_folded(logged)
            case _:
                self.telemetry.on_event(logged)
        if isinstance(logged, RoundClosed):
            self.closed.append(logged)

    def take(self, updates: list[SubmitUpdate]) -> list[str]:
        event, outcomes = self.aggregator.decide_updates(updates)
        if event is not None:
            self._log(event)
        for outcome in outcomes:
            settled = UpdateSettled(key="k", outcome=outcome.word, reason=outcome.reason)
            decode(encode(settled), UpdateSettled)
        self.go_on()
        return [outcome.word for outcome in outcomes]

    def overdue(self) -> None:
        for event in self.aggregator.decide_close(overdue=True):
            self._log(event)
        self.go_on()

    def go_on(self) -> None:
        while events := self.aggregator.decide_next():
            for event in events:
                self._log(event)

    def shown(self) -> None:
        """Whatever is asked of them can be answered and read."""
        decode(encode(self.scheduler.listed(1e6)), Message)
        msgspec.json.encode(everything(self.telemetry, "demo", 1e6, ""))
        assert exposition(self.telemetry, {})


PARTS = st.sampled_from([0, 1, 2**32 - 1])
NUMBERS = st.sampled_from([-(2**31), -1, 0, 1, 2**31 - 1])


@st.composite
def extremes(draw: st.DrawFn, services: Services) -> SubmitUpdate:
    """An update of the open round that is right in form, with numbers at the edges of theirs."""
    opened = services.aggregator.open
    assert opened is not None
    key = UpdateKey("demo", 0, draw(st.sampled_from([opened.round, 1])), "till-7", draw(PARTS))
    record = services.aggregator.rounds.get(key.round)
    first = draw(st.integers(0, 31))
    count = draw(st.integers(0, 32 - first))
    numbers = draw(st.lists(NUMBERS, min_size=count, max_size=count))
    work_s = draw(st.sampled_from([0.0, 5e-324, 1.0, 1e9]))
    digest = record.opened.digest if record else "0" * 64
    weight = draw(st.sampled_from([0, 1, 2**31 - 1]))
    if draw(st.booleans()):
        loss = draw(st.sampled_from([0.0, 5e-324, 1e15]))
        evaluated = EvaluateResult(draw(st.sampled_from([0, 1, 2**31 - 1])), 0, weight, loss)
        return SubmitUpdate(key=key, digest=digest, result=evaluated, work_s=work_s)
    bends = draw(st.sampled_from([b"", np.array(numbers, "<i4").tobytes()]))
    probed = ProbeResult(
        how="probe",
        ranges=[(first, count)] if count else [],
        differences=np.array(numbers, "<i4").tobytes(),
        bends=bends,
        loss=draw(st.sampled_from([0, 2**52])),
        weight=weight,
        dropped=2**53,
    )
    return SubmitUpdate(key=key, digest=digest, result=probed, work_s=work_s, passes=2**53)


@pytest.mark.parametrize("normalise", ["none", "rms"])
@pytest.mark.parametrize("momentum", [0, 255])
@given(data=st.data())
@A_LOT
def test_updates_with_numbers_at_every_edge_stop_no_round(
    normalise: str, momentum: int, data: st.DataObject
) -> None:
    services = Services(momentum=momentum)
    spec = services.aggregator.spec
    tuning = msgspec.structs.replace(spec.tuning, normalise=normalise, step=1e6, eps=1e-6)
    services.aggregator.spec = msgspec.structs.replace(spec, tuning=tuning)
    for _ in range(3):
        opened = services.aggregator.open
        if opened is None or opened.kind != "tune":
            break
        services.take(data.draw(st.lists(extremes(services), max_size=5)))
        if services.aggregator.open is opened:
            services.take([a_probe(opened, f"honest-{n}", count=16) for n in range(2)])
        if services.aggregator.open is opened:
            services.overdue()
        assert services.aggregator.open is not opened
    services.shown()


@given(data=st.data())
@A_LOT
def test_requests_and_reports_at_every_edge_leave_work_for_others(data: st.DataObject) -> None:
    services = Services()
    now = 20.0
    some = data.draw(
        st.lists(poison.messages(RequestWork) | poison.messages(DeviceReport), max_size=4)
    )
    for one in some:
        now += 0.1
        message: Any = decode(poison.pack(one), Message)
        services.scheduler.evolve(message, now)
        if isinstance(message, RequestWork):
            answer = services.scheduler.decide(message, now).message
            decode(encode(answer), Message)
            if isinstance(answer, WorkAssigned):
                services.scheduler.evolve(answer, now)
        else:
            services.telemetry.on_device_report(message, now)
            services.scheduler.wanted_by(message.device, now)
        for selection in services.scheduler.plan(now):
            services.scheduler.evolve(selection, now)
            services.scheduler.called(selection, now)
    services.shown()
    services.scheduler.evolve(device_report("honest", models=["a" * 64]), now)
    asked = RequestWork(device="honest", kinds=["probe"])
    services.scheduler.evolve(asked, now)
    answer = services.scheduler.decide(asked, now)
    assert isinstance(answer.message, WorkAssigned), answer.message
