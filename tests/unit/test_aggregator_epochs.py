"""A job of several epochs: it waits for the next, begins it where it is told, and loses nothing."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import replace

from shared.adapter import Adapter, next_epoch
from shared.blobs import reference
from shared.codec import decode_manifest, encode_manifest
from shared.errors import RejectError
from shared.messages import (
    EpochOpened,
    JobEnded,
    ModelPublished,
    OpenEpoch,
    RoundClosed,
    RoundOpened,
    SubmitJob,
    SubmitUpdate,
)
from tests.support.jobs import a_job, a_job_of, a_probe, a_walk, an_evaluation
from tests.support.runs import Run, words


def of_epochs(submit: SubmitJob, epochs: int = 2) -> SubmitJob:
    return replace(submit, spec=replace(submit.spec, epochs=epochs))


def work(run: Run) -> None:
    """The fleet does an epoch, and sends an update too late in each round."""
    before = run.opened
    while run.state.open is not None:
        opened = run.opened
        for name in ("a", "b", "late"):
            if run.state.open is opened or name == "late":
                run.send(some(opened, name))
        run.send(some(before, "later"))
        before = opened


def some(opened: RoundOpened, device: str) -> SubmitUpdate:
    if opened.walk is not None:
        return a_walk(opened, device)
    return a_probe(opened, device, first={"a": 0, "b": 8}.get(device, 16))


def test_with_epochs_left_a_job_publishes_and_waits_and_the_last_ends_it() -> None:
    run = Run(of_epochs(a_job(rounds=2, evaluate_every=1, momentum=180)))
    for epoch in (0, 1):
        for _ in range(2):
            assert run.opened.epoch == epoch
            run.send(an_evaluation(run.opened, "trusted"))
            run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
        assert run.opened.kind == "evaluate"
        run.send(an_evaluation(run.opened, "trusted"))
        if epoch == 0:
            assert run.state.summary().status == "waiting"
            assert [type(event) for event in run.log[-2:]] == [RoundClosed, ModelPublished]
            run.open_epoch(run.next_epoch())
    assert [type(event) for event in run.log[-2:]] == [ModelPublished, JobEnded]
    assert [opened.round for opened in run.opened_rounds()] == [1, 2, 3, 4, 5, 6]
    assert [opened.commits for opened in run.opened_rounds()] == [0, 1, 2, 0, 1, 2]
    last = [event for event in run.log if isinstance(event, ModelPublished)][-1]
    assert isinstance(run.log[last.epoch_sequence - 1], EpochOpened)
    assert last.epoch == 1


def test_an_epoch_moves_on_from_its_start_and_every_reader_gets_there() -> None:
    run = Run(of_epochs(a_job(rounds=3, momentum=180)))
    work(run)
    waited = run.state.adapter
    request = run.next_epoch()
    run.open_epoch(request)
    start = Adapter.from_bytes(request.manifest, run.blobs[request.start.digest])
    assert np.array_equal(start.theta, waited.theta // 2)
    opened = next(event for event in reversed(run.log) if isinstance(event, EpochOpened))
    assert opened.digest == start.digest() == run.opened.digest
    assert (opened.start, opened.anchor) == (request.start, request.anchor)
    work(run)
    for close in run.closes():
        if close.epoch == 1:
            start.apply(close.round, close.commit)
    assert run.state.ended is not None
    assert start.digest() == run.state.ended.digest


@pytest.mark.parametrize("method", ["seedwire", "fwdllm", "fedkseed-pro"])
@settings(deadline=None, max_examples=20)
@given(cut=st.floats(0.0, 1.0))
def test_a_kill_after_any_fact_of_any_epoch_changes_nothing(method: str, cut: float) -> None:
    whole = Run(of_epochs(a_job_of(method, rounds=2), 3))
    requests: list[OpenEpoch] = []
    while True:
        work(whole)
        if whole.state.ended:
            break
        requests.append(whole.next_epoch())
        whole.open_epoch(requests[-1])
    broken = whole.cut(round(cut * len(whole.history)))
    facts = len(broken.history)
    broken.settle()
    assert broken.history[:facts] == whole.history[:facts]
    while broken.state.ended is None:  # devices and operator send again what they have
        for update in whole.sent:
            broken.send(update)
        if broken.state.waiting:
            broken.open_epoch(requests[broken.state.summary().epoch])
    assert [event for _, event in broken.history] == [event for _, event in whole.history]


def test_an_update_of_an_epoch_that_is_over_is_settled_and_counts_nowhere() -> None:
    run = Run(of_epochs(a_job(rounds=1)))
    old = run.opened
    run.send(a_probe(old, "a"), a_probe(old, "b", first=8))
    assert words(run.send(a_probe(old, "late", first=16))) == ["too_late"]
    run.open_epoch(run.next_epoch())
    facts = len(run.detail)
    assert words(run.send(a_probe(old, "a"), a_probe(old, "later", first=16))) == ["too_late"] * 2
    ahead = a_probe(replace(run.opened, epoch=2), "a")
    assert words(run.send(ahead)) == ["rejected"]
    assert len(run.detail) == facts


def test_a_job_that_waits_can_be_stopped_and_a_stopped_one_waits_for_nothing() -> None:
    run = Run(of_epochs(a_job(rounds=1)))
    stopped = run.restarted()
    work(run)
    assert [type(event) for event in run.state.decide_stop()] == [JobEnded]
    for event in stopped.state.decide_stop():
        stopped._log(event)  # pyright: ignore[reportPrivateUsage]
    stopped.settle()
    assert stopped.state.ended is not None
    assert stopped.state.ended.reason == "stopped"


def test_who_does_not_wait_opens_no_epoch() -> None:
    run = Run(of_epochs(a_job(rounds=1)))
    with pytest.raises(RejectError, match=r"is running in epoch 1 of 2"):
        run.open_epoch(run.next_epoch())
    work(run)
    request = run.next_epoch()
    run.open_epoch(request)
    with pytest.raises(RejectError, match=r"is running in epoch 2 of 2"):
        run.open_epoch(request)


Change = Callable[[Adapter], Adapter]


def _of(adapter: Adapter, **changes: object) -> Adapter:
    manifest = replace(adapter.manifest, **changes)
    return Adapter.placed(encode_manifest(manifest), adapter.round, adapter.theta)


CHANGES: list[tuple[Change, str]] = [
    (lambda a: _of(a, epoch=2), "the manifest is of epoch 2, next is epoch 1"),
    (lambda a: _of(a, architecture="qwen2"), "the manifest is for qwen2"),
    (lambda a: _of(a, update_rule="momentum"), "momentum and the manifest's"),
    (lambda a: _of(a, a_epoch=3), "a_epoch 3 is later"),
    (lambda a: a.after(a.round + 1, None), "after round 2, the job waits after 1"),
]


@pytest.mark.parametrize(("change", "why"), CHANGES)
def test_an_epoch_that_does_not_follow_is_refused_by_name(change: Change, why: str) -> None:
    run = Run(of_epochs(a_job(rounds=1)))
    work(run)
    before = run.state.adapter
    right = encode_manifest(next_epoch(before.manifest))
    wrong = change(Adapter.placed(right, before.round, before.theta))
    data, manifest = wrong.to_bytes(), encode_manifest(wrong.manifest)
    request = OpenEpoch(job="demo", manifest=manifest, start=reference(data))
    with pytest.raises(RejectError, match=why):
        run.state.decide_epoch(request, data, None)
    with pytest.raises(RejectError, match=r"start is no adapter"):
        run.state.decide_epoch(replace(request, manifest=right), b"\x80", None)
    assert run.state.waiting


def test_a_manifest_without_another_epochs_a_has_the_bytes_it_always_had() -> None:
    data = a_job().manifest
    manifest = decode_manifest(data)
    assert manifest.a_epoch is UNSET
    assert b"a_epoch" not in data
    assert encode_manifest(manifest) == data
    second = next_epoch(next_epoch(manifest))
    assert (second.epoch, second.a_epoch, second.epoch_of_a) == (2, 0, 0)
