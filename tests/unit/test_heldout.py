"""Held-out rows judge a job's versions: the best is known, is kept, and ends a job that stands."""

from collections.abc import Sequence

from msgspec.structs import replace

from shared.heldout import MOST_VERSIONS
from shared.messages import EvaluateResult, JobEnded, ModelPublished, RoundOpened, SubmitUpdate
from tests.support.jobs import a_job, an_evaluation, judged
from tests.support.runs import Run, measured_run, moved


def a_run(figures: Sequence[tuple[int, float]], *, tokens: bool = False, patience: int = 0) -> Run:
    """A job measured as it begins and after each round; with `tokens` it has no right answers."""
    job = a_job(rounds=len(figures) - 1, evaluate_every=1, patience=patience)
    if tokens:
        task = replace(job.spec.task, loss="tokens", labels={})
        job = replace(job, spec=replace(job.spec, task=task))
    return measured_run(figures, job)


def best(run: Run) -> int:
    return judged(run.log).ranked()[0].round


def test_most_right_answers_are_best_and_of_equals_the_least_loss() -> None:
    assert best(a_run([(25, 140), (60, 90), (71, 99), (70, 80), (65, 85)])) == 2
    assert best(a_run([(25, 140), (60, 90), (71, 99), (71, 80), (65, 85)])) == 3


def test_where_no_answer_is_right_the_least_loss_is_best() -> None:
    assert best(a_run([(0, 400), (0, 300), (9, 310), (0, 320)], tokens=True)) == 1


def test_the_adapter_that_a_job_ends_with_has_the_figures_of_its_closing_evaluation() -> None:
    run = a_run([(25, 140), (60, 90), (70, 80)])
    ended = run.log[-1]
    assert isinstance(ended, JobEnded)
    measured = judged(run.log).of(ended.digest)
    assert measured is not None
    assert measured.accuracy == 0.7
    assert best(run) == ended.round


def test_figures_that_come_late_are_of_the_adapter_that_was_measured() -> None:
    run = Run(a_job(rounds=3, evaluate_every=1))
    opened: list[RoundOpened] = []
    late: list[SubmitUpdate] = []
    for correct in (25, 90, 60, 50):
        opened.append(run.opened)
        measured = an_evaluation(run.opened, "trusted", correct=correct)
        late += [measured] if correct == 90 else []
        if correct != 90:
            run.send(measured)
        if correct == 60:
            run.send(*late)
        if opened[-1].kind == "tune":
            moved(run)
    assert [one.correct for one in judged(run.log).measured] == [25, 90, 60, 50]
    assert best(run) == opened[0].round


def test_whatever_is_measured_has_been_published() -> None:
    run = a_run([(25, 140), (60, 90), (71, 99), (70, 80)])
    published = {event.digest for event in run.log if isinstance(event, ModelPublished)}
    asked = [event for event in run.log if isinstance(event, RoundOpened) and event.evaluate]
    assert {event.digest for event in asked[1:]} <= published


def test_a_job_without_anything_better_ends_when_its_patience_is_out() -> None:
    figures = [(25, 140.0), (60, 90.0), (55, 95.0), (60, 91.0), (61, 90.0), *[(61, 90.0)] * 20]
    run = a_run(figures, patience=3)
    rounds = [event.round for event in run.log if isinstance(event, RoundOpened)]
    assert isinstance(run.log[-1], JobEnded)
    # The fifth is better; three that are not follow, and the round that was open then is closed.
    assert max(rounds) == 8
    assert best(run) == 7
    figures.pop()
    cut = measured_run(figures[:7], a_job(rounds=24, evaluate_every=1, patience=3)).restarted()
    cut.send(an_evaluation(cut.opened, "trusted", correct=61, loss=90.0))
    moved(cut)
    assert cut.log[-1] == run.log[-1]


def test_who_has_no_rows_has_measured_nothing() -> None:
    run = Run(a_job(rounds=3, evaluate_every=1, patience=1))
    nothing = an_evaluation(run.opened, "trusted", correct=0, loss=0.0)
    empty = EvaluateResult(examples=0, correct=0, weight=0, loss=0.0)
    run.send(replace(nothing, result=empty))
    assert judged(run.log).measured == []
    moved(run)
    run.send(an_evaluation(run.opened, "trusted"))
    moved(run)
    assert run.state.ended is None


def test_versions_without_end_are_told_apart_as_long_as_they_may_be_the_best() -> None:
    run = a_run([(25, 140), (90, 40), *[(30 + n % 9, 130) for n in range(600)]])
    held_out = judged(run.log)
    assert held_out.ranked()[0].round == 1
    assert len(held_out.ranked()) <= MOST_VERSIONS


def test_the_store_keeps_the_best_beside_the_newest_and_is_told_what_is_neither() -> None:
    run = a_run([(25, 140), (90, 40), (80, 50), *[(30, 130)] * 8])
    needed = {one.digest for one in run.state.snapshots.needed}
    by_round = {
        event.round: event.snapshot.digest for event in run.log if isinstance(event, ModelPublished)
    }
    newest = sorted(by_round)[-2:]
    assert needed == {by_round[number] for number in (1, 2, *newest)}
    assert not needed & {one.digest for one in run.state.snapshots.outdated}
    assert run.restarted().state.snapshots.needed == run.state.snapshots.needed
