"""Rounds whose sums wait for the commit of a later one: over restarts, and where nobody comes."""

import pytest
from msgspec.structs import replace

from shared.messages import RoundClosed, SubmitJob
from tests.support.jobs import a_job_of, a_probe
from tests.support.runs import Run, moved


def fwdllm(most_more: int, **pacing: object) -> SubmitJob:
    """Its halves never agree: it commits after `most_more` rounds more on a batch."""
    job = a_job_of("fwdllm", rounds=2, threshold=1e-12, most_more=most_more, candidates=1)
    return replace(job, spec=replace(job.spec, pacing=replace(job.spec.pacing, **pacing)))


def a_close(run: Run) -> RoundClosed:
    """Two devices answer the open round."""
    moved(run)
    return run.closes()[-1]


@pytest.mark.parametrize("lateness", [0, 4])
def test_sums_that_wait_longer_than_latecomers_may_outlive_a_restart(lateness: int) -> None:
    run = Run(fwdllm(7, lateness_rounds=lateness))
    for _ in range(7):
        assert a_close(run).more
    again = run.restarted()
    assert again.state.carried == run.state.carried == [1, 2, 3, 4, 5, 6, 7]
    close = a_close(run)
    assert close.commit is not None
    assert [term.stream_round for term in close.commit.terms] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert a_close(again) == close
    assert again.opened == run.opened


def test_rounds_to_which_nobody_comes_do_not_pile_up_while_sums_wait() -> None:
    run = Run(fwdllm(1))
    a_close(run)
    for _ in range(100):
        run.overdue()
    again = run.restarted()
    assert again.state.carried == run.state.carried == [1]
    assert len(run.state.rounds) < 20
    close = a_close(run)
    assert close.commit is not None
    assert [term.stream_round for term in close.commit.terms] == [1, 102]
    assert a_close(again) == close


def test_who_came_to_a_round_that_was_abandoned_for_too_little_is_not_lost() -> None:
    run = Run(fwdllm(1, minimum_probes=12, lateness_rounds=1))
    a_close(run)
    run.send(a_probe(run.opened, "c"))  # eight probes of twelve
    for _ in range(4):
        run.overdue()
    assert run.state.carried == [1, 2]
    close = a_close(run)
    assert close.commit is not None
    assert [term.stream_round for term in close.commit.terms] == [1, 2, 6]
