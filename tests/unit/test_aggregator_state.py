"""A job is what its log says: whatever order, repetition or restart its updates come by."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.aggregator.opening import open_job
from shared.adapter import coefficients
from shared.errors import RejectError
from shared.messages import (
    AdapterEvaluated,
    JobEnded,
    ModelPublished,
    ProbeResult,
    RoundClosed,
    RoundOpened,
    RoundReport,
    SubmitUpdate,
    UpdatesFolded,
)
from tests.support.jobs import (
    a_job,
    a_job_of,
    a_probe,
    a_walk,
    adapter_after,
    an_evaluation,
)
from tests.support.runs import Run, words


def test_a_job_runs_from_opening_to_end() -> None:
    run = Run(a_job(rounds=2, evaluate_every=1))
    for _ in range(2):
        run.send(an_evaluation(run.opened, "trusted"))
        assert words(run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))) == [
            "folded",
            "folded",
        ]
    assert run.opened.kind == "evaluate"
    run.send(an_evaluation(run.opened, "trusted", correct=70))
    kinds = [type(event) for event in run.log]
    assert kinds[-3:] == [RoundClosed, ModelPublished, JobEnded]
    assert sum(kind is AdapterEvaluated for kind in kinds) == 3
    assert [close.reason for close in run.closes()] == ["enough", "enough", "evaluated"]
    assert run.state.summary().accuracy == 0.7
    reports = [event for event in run.detail if isinstance(event, RoundReport)]
    assert [len(report.contributions) for report in reports] == [2, 2, 0]


def test_every_reader_of_the_log_ends_at_the_logged_digest() -> None:
    run = Run(a_job(rounds=5, momentum=200))
    while run.state.ended is None:
        run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
    assert adapter_after(run.submit.manifest, run.log).digest() == run.closes()[-1].digest


def test_the_commit_is_the_negative_weighted_mean_of_the_slopes() -> None:
    run = Run(a_job(rounds=1))
    one, two = a_probe(run.opened, "a", weight=4), a_probe(run.opened, "b", first=4, weight=12)
    opened = run.opened
    run.send(one, two)
    commit = run.closes()[0].commit
    assert commit is not None
    term = commit.terms[0]
    assert term.ranges == [(0, 12)]
    slopes, weights = np.zeros(12), np.zeros(12)
    for update, first in ((one, 0), (two, 4)):
        assert isinstance(update.result, ProbeResult)
        found = np.frombuffer(update.result.differences, "<i4") * 2.0**-20
        slopes[first : first + 8] += found / (2 * opened.eps)
        weights[first : first + 8] += update.result.weight
    expected = -0.1 * slopes / weights.sum() * 2**24
    assert np.allclose(coefficients(term), np.rint(expected), atol=1)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 7))
def test_order_repetition_and_batching_change_nothing_but_the_halves(seed: int, batch: int) -> None:
    submit = a_job(rounds=1, enough_devices=6, enough_probes=48, directions=64)
    plain = Run(submit)
    updates = [a_probe(plain.opened, f"d{i}", first=5 * i) for i in range(6)]
    plain.send(*updates)
    chance = random.Random(seed)
    shuffled = Run(submit)
    sent = [*updates, *chance.choices(updates, k=6)]
    chance.shuffle(sent)
    outcomes: list[str] = []
    for at in range(0, len(sent), batch):
        outcomes += words(shuffled.send(*sent[at : at + batch]))
    assert sorted(outcomes).count("folded") == 6
    assert shuffled.closes()[0].digest == plain.closes()[0].digest
    assert shuffled.closes()[0].commit == plain.closes()[0].commit


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(0, 40))
def test_a_restart_at_any_event_goes_on_to_the_same_digest(cut: int) -> None:
    def play(run: Run, *, restart_after: int) -> Run:
        step = 0
        while run.state.ended is None:
            opened = run.opened
            for update in (a_probe(opened, "a"), a_probe(opened, "b", first=8)):
                run.send(update)
                step += 1
                if step == restart_after:
                    run = run.restarted()
                    assert words(run.send(update)) in (["duplicate"], ["too_late"])
        return run

    submit = a_job(rounds=6, momentum=180, snapshot_every=2)
    whole = play(Run(submit), restart_after=-1)
    broken = play(Run(submit), restart_after=cut)
    assert broken.closes()[-1].digest == whole.closes()[-1].digest
    assert [type(event) for event in broken.log] == [type(event) for event in whole.log]


@pytest.mark.parametrize("method", ["seedwire", "mezo", "fwdllm", "fedkseed", "fedkseed-pro"])
@settings(deadline=None, max_examples=12)
@given(cut=st.floats(0.0, 1.0))
def test_whatever_the_method_a_kill_after_any_fact_changes_nothing(method: str, cut: float) -> None:
    def some(opened: RoundOpened, device: str, *, first: int = 0) -> SubmitUpdate:
        if opened.walk is not None:
            return a_walk(opened, device)
        return a_probe(opened, device, first=first)

    def play(run: Run) -> Run:
        before = run.opened
        while run.state.ended is None:
            opened = run.opened
            for name in ("a", "b"):
                if run.state.open is opened:
                    run.send(some(opened, name, first=8 * (name == "b")))
            run.send(some(opened, "late", first=16))
            run.send(some(before, "later", first=16))
            before = opened
        return run

    submit = a_job_of(method, rounds=4)
    whole = play(Run(submit))
    broken = whole.cut(round(cut * len(whole.history)))
    facts = len(broken.history)
    broken.settle()
    assert broken.history[:facts] == whole.history[:facts]
    while broken.state.ended is None:  # devices send again what they have, in the same order
        for update in whole.sent:
            broken.send(update)
    assert broken.closes()[-1].digest == whole.closes()[-1].digest
    assert [event for _, event in broken.history] == [event for _, event in whole.history]
    assert adapter_after(submit.manifest, broken.log).digest() == broken.closes()[-1].digest
    if method == "fwdllm":
        assert any(close.more for close in whole.closes())
    if method == "fedkseed-pro":
        assert whole.opened_rounds()[1].walk != whole.opened_rounds()[0].walk


def test_a_crash_between_evaluation_and_its_fact_loses_and_doubles_nothing() -> None:
    run = Run(a_job(rounds=1, evaluate_every=1))
    event, _ = run.state.decide_updates([an_evaluation(run.opened, "trusted")])
    assert event is not None
    run.detail.append(event)  # logged, and then killed
    twin = run.restarted()
    twin.settle()
    assert sum(isinstance(event, AdapterEvaluated) for event in twin.log) == 1
    again = twin.restarted()
    again.settle()
    assert sum(isinstance(event, AdapterEvaluated) for event in again.log) == 1


def test_a_kill_between_two_evaluations_of_one_batch_loses_neither() -> None:
    run = Run(a_job(rounds=3, evaluate_every=1))
    first = run.opened
    run.send(a_probe(first, "a"), a_probe(first, "b", first=8))
    second = run.opened
    late, now = an_evaluation(first, "trusted"), an_evaluation(second, "trusted")
    event, _ = run.state.decide_updates([late, now])
    assert event is not None
    run.detail.append(event)
    run.state.evolve(event, len(run.detail))
    one_of_two = run.state.decide_next()[0]
    assert isinstance(one_of_two, AdapterEvaluated)
    run.log.append(one_of_two)  # logged, and then killed
    twin = run.restarted()
    twin.settle()
    rounds = [event.round for event in twin.log if isinstance(event, AdapterEvaluated)]
    assert sorted(rounds) == [1, 2]


def test_a_late_update_is_a_discounted_term_of_the_next_close() -> None:
    run = Run(a_job(rounds=3))
    first = run.opened
    latecomer = a_probe(first, "late", first=16)
    run.send(a_probe(first, "a"), a_probe(first, "b", first=8))
    assert words(run.send(latecomer)) == ["late"]
    assert words(run.send(latecomer)) == ["duplicate"]
    run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
    first_close, second_close = run.closes()
    assert second_close.commit is not None
    assert first_close.frozen is not None
    assert second_close.late == 1
    own, late = second_close.commit.terms
    assert (own.stream_round, late.stream_round) == (2, 1)
    assert isinstance(latecomer.result, ProbeResult)
    slopes = np.frombuffer(latecomer.result.differences, "<i4") * 2.0**-20 / (2 * first.eps * 4)
    frozen = first_close.frozen
    held = np.clip(slopes, -frozen.clip, frozen.clip)
    expected = -frozen.step * held * 4 / (frozen.normaliser + 8 * 4) / 2 * 2**24
    assert np.allclose(coefficients(late), np.rint(expected), atol=1)


def test_latecomers_of_a_round_that_closed_with_little_add_no_more_than_a_few_steps() -> None:
    run = Run(a_job(rounds=3))
    first = run.opened
    run.send(a_probe(first, "small", weight=1))
    run.overdue()
    crowd = [a_probe(first, f"d{number}", weight=100) for number in range(50)]
    run.send(*crowd[:25])
    run.send(*crowd[25:])
    run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
    frozen, commit = run.closes()[0].frozen, run.closes()[1].commit
    assert frozen is not None
    assert commit is not None
    late = coefficients(commit.terms[1])
    whole_step = frozen.step * frozen.clip * 2**24 / 8  # every slope at the clip, all of the mean
    assert np.abs(late).max() <= np.log(51) * whole_step


def test_past_the_lateness_bound_an_update_is_settled_without_effect() -> None:
    run = Run(a_job(rounds=9))
    first = run.opened
    for _ in range(5):
        run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
    before = len(run.detail)
    assert words(run.send(a_probe(first, "late"))) == ["too_late"]
    assert len(run.detail) == before


def test_a_slow_evaluation_is_welcome_when_a_probe_of_its_round_is_too_late() -> None:
    run = Run(a_job(rounds=9, evaluate_every=1))
    first = run.opened
    for _ in range(9):
        run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
    assert run.opened.kind == "evaluate"
    outcomes = run.send(an_evaluation(first, "slow"), a_probe(first, "late"))
    assert words(outcomes) == ["folded", "too_late"]
    assert words(run.send(an_evaluation(first, "slow"))) == ["duplicate"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digest": "f" * 64}, "measured at adapter ffffffffffff"),
        ({"first": 30}, "direction 37 in a pool of 32"),
    ],
)
def test_an_update_that_cannot_be_used_is_rejected_and_says_why(
    change: dict[str, str | int], why: str
) -> None:
    run = Run(a_job())
    outcome = run.send(a_probe(run.opened, "a", **change))[0]  # pyright: ignore[reportArgumentType]
    assert outcome.word == "rejected"
    assert why in outcome.reason


def test_a_round_without_probes_is_abandoned_and_opened_again_with_more_time() -> None:
    run = Run(a_job(rounds=1))
    patience = [run.opened.deadline_s]
    before = run.state.summary()
    for _ in range(3):
        run.overdue()
        patience.append(run.opened.deadline_s)
    assert [close.reason for close in run.closes()] == ["abandoned"] * 3
    assert patience == [60.0, 120.0, 240.0, 480.0]
    assert run.state.commits == 0
    assert run.state.summary().status == before.status == "running"
    run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
    assert run.state.commits == 1


def test_late_terms_count_even_if_the_round_they_came_in_is_abandoned() -> None:
    run = Run(a_job(rounds=2))
    first = run.opened
    latecomer = a_probe(first, "late", first=16)
    run.send(a_probe(first, "a"), a_probe(first, "b", first=8))
    assert words(run.send(latecomer)) == ["late"]
    run.overdue()
    abandoned = run.closes()[-1]
    assert abandoned.reason == "abandoned"
    assert abandoned.commit is not None
    assert [term.stream_round for term in abandoned.commit.terms] == [1]
    assert run.state.commits == 1
    assert adapter_after(run.submit.manifest, run.log).digest() == run.opened.digest
    assert run.restarted().state.adapter.digest() == run.opened.digest


def test_at_its_deadline_a_round_closes_with_what_came() -> None:
    run = Run(a_job(rounds=2))
    run.send(a_probe(run.opened, "a"))
    run.overdue()
    assert [(close.reason, close.devices) for close in run.closes()] == [("deadline", 1)]


def test_the_logs_of_folded_updates_name_every_update_once() -> None:
    run = Run(a_job(rounds=4))
    while run.state.ended is None:
        run.send(*[a_probe(run.opened, name) for name in ("a", "b", "a")])
    rows = [
        (row.device, row.round, row.part)
        for event in run.detail
        if isinstance(event, UpdatesFolded)
        for row in event.updates
    ]
    assert len(rows) == len(set(rows)) == 8


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("tuning", {"method": "magic"}, "method 'magic' is unknown"),
        (
            "tuning",
            {"how": "exact"},
            "needs an adapter of output rows and the last block's LoRA alone",
        ),
        ("tuning", {"directions": 60_000}, "60000 directions do not fit one event of the log"),
        ("pacing", {"minimum_probes": 99}, "minimum_probes 99 is more than enough_probes 16"),
        ("task", {"template": "no place"}, "template must hold {text}"),
        ("task", {"labels": {"a": " x", "b": " x"}}, "labels share the word ' x'"),
        ("task", {"labels": {"a": " x"}}, "at least two labels"),
    ],
)
def test_a_job_that_cannot_work_is_refused_by_name(
    part: str, change: dict[str, object], why: str
) -> None:
    job = a_job()
    changed = replace(getattr(job.spec, part), **change)
    with pytest.raises(RejectError, match=re.escape(why)):
        open_job(replace(job, spec=replace(job.spec, **{part: changed})))


def test_who_is_not_allowed_is_rejected() -> None:
    job = a_job()
    run = Run(replace(job, spec=replace(job.spec, allow_devices=["a"])))
    outcomes = run.send(a_probe(run.opened, "a"), a_probe(run.opened, "stranger"))
    assert words(outcomes) == ["folded", "rejected"]


def test_who_is_not_among_the_jobs_judges_measures_nothing() -> None:
    job = a_job(evaluate_every=1)
    evaluation = replace(job.spec.evaluation, allow_devices=["judge"])
    run = Run(replace(job, spec=replace(job.spec, evaluation=evaluation)))
    asked = (an_evaluation(run.opened, "stranger", correct=100), an_evaluation(run.opened, "judge"))
    assert words(run.send(*asked, a_probe(run.opened, "stranger"))) == [
        "rejected",
        "folded",
        "folded",
    ]
    assert run.state.summary().accuracy == 0.3
