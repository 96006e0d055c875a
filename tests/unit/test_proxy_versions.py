"""Which version serves: the log's facts, the disk and the operator's word."""

import pytest

from services.proxy_inference.versions import Pin, UnknownVersion, Version, Versions
from shared.messages import (
    BlobRef,
    EpochOpened,
    JobOpened,
    JobSpec,
    LogEvent,
    ModelPublished,
    Task,
)
from tests.support.jobs import a_job
from tests.support.runs import measured_run, moved

SPEC = JobSpec(task=Task(loss="tokens"))


def digest(job: str, round: int) -> str:
    return f"{ord(job[-1]):02x}{round:04x}".ljust(64, "0")


def published(job: str, round: int) -> ModelPublished:
    return ModelPublished(
        job=job,
        epoch=0,
        round=round,
        digest=digest(job, round),
        snapshot=BlobRef(digest(job, round), 10),
    )


def a_log(versions: Versions, *facts: tuple[str, int], start: int = 1) -> None:
    for sequence, (job, round) in enumerate(facts, start):
        versions.see(sequence, JobOpened(job=job, spec=SPEC))
        versions.see(sequence, EpochOpened(job=job, epoch=0, manifest=b"m", digest="0" * 64))
        versions.see(sequence, published(job, round))


def keep(versions: Versions, job: str, round: int, sequence: int) -> Version:
    ref = BlobRef(digest(job, round), 10)
    version = Version(job, 0, round, digest(job, round), ref, sequence)
    versions.keep(version, SPEC, b"m")
    return version


def wanted(versions: Versions) -> str | None:
    version = versions.wanted()
    return version.name if version else None


def test_the_job_that_published_last_serves_unless_one_was_named() -> None:
    versions, only = Versions(), Versions("a")
    assert wanted(versions) is None
    for each in (versions, only):
        a_log(each, ("a", 5), ("b", 2), ("a", 6), ("b", 3))
    assert wanted(versions) == "b@3"
    assert wanted(only) == "a@6"


def test_a_refused_version_leaves_the_one_before_it_and_the_next_is_tried() -> None:
    versions = Versions()
    a_log(versions, ("a", 5), ("a", 6))
    newest = versions.wanted()
    assert newest is not None
    versions.refuse(newest, "its digest is another")
    assert wanted(versions) == "a@5"
    a_log(versions, ("a", 7), start=9)
    assert wanted(versions) == "a@7"
    with pytest.raises(UnknownVersion):
        versions.of("a", 6)


def test_rollback_goes_one_back_again_and_again_and_follow_returns() -> None:
    versions = Versions()
    for number, round in enumerate((5, 6, 7), 1):
        keep(versions, "a", round, number)
    assert versions.rollback(versions.wanted(), None) == Pin("a", 6)
    assert versions.rollback(versions.wanted(), None) == Pin("a", 5)
    a_log(versions, ("a", 8), start=20)
    assert wanted(versions) == "a@5"
    assert versions.of("a").name == "a@5"
    with pytest.raises(
        UnknownVersion, match="a: no version older than round 5 is kept; on disk: rounds 5, 6, 7"
    ):
        versions.rollback(versions.wanted(), None)
    versions.follow()
    assert wanted(versions) == "a@8"
    assert versions.rollback(versions.wanted(), 6) == Pin("a", 6)
    with pytest.raises(
        UnknownVersion, match="no version of round 8 is kept; on disk: rounds 5, 6, 7"
    ):
        versions.rollback(versions.wanted(), 8)


def test_a_pin_whose_version_is_gone_does_not_stop_the_service() -> None:
    versions = Versions(pin=Pin("a", 1))
    a_log(versions, ("a", 9))
    assert wanted(versions) == "a@9"


def test_another_brokers_log_takes_the_place_of_what_was_left_on_disk() -> None:
    versions = Versions()
    keep(versions, "old", 90, sequence=5000)
    assert wanted(versions) == "old@90"
    a_log(versions, ("new", 3))
    versions.history_read()
    assert wanted(versions) == "new@3"
    assert versions.of("old").name == "old@90"


def test_the_disk_keeps_the_newest_and_whatever_is_in_use() -> None:
    versions = Versions()
    kept = [keep(versions, "a", round, round) for round in range(1, 8)]
    versions.pin = Pin("a", 1)
    surplus = {version.round for version in versions.surplus(2, [kept[3]])}
    assert surplus == {2, 3, 5}
    for version in versions.surplus(2, [kept[3]]):
        versions.forget(version)
    assert [version.round for version in versions.listed()] == [7, 6, 4, 1]


def test_what_is_asked_for_by_name_is_found_or_told_with_what_there_is() -> None:
    versions = Versions()
    a_log(versions, ("a", 5), ("a", 6))
    assert versions.of("a").round == 6
    assert versions.of("a", 5).round == 5
    with pytest.raises(UnknownVersion, match=r"no job 'gpt-4' has published.*: a"):
        versions.of("gpt-4")
    with pytest.raises(UnknownVersion, match="a has no round 7; rounds at hand: 6"):
        versions.of("a", 7)


BEST_IN_THE_MIDDLE = [(25, 140.0), (60, 90.0), (80, 50.0), (70, 60.0), (50, 90.0)]
"""Right answers and loss of 100 held-out rows: at the start, and after each of four rounds."""

JOB = a_job(rounds=4, evaluate_every=1)


def follow(versions: Versions, log: list[LogEvent], done: int = 0) -> list[str | None]:
    """What was wanted from fact to fact, after the `done` first."""
    seen: list[str | None] = []
    for sequence, event in enumerate(log[done:], done + 1):
        versions.see(sequence, event)
        if not seen or seen[-1] != wanted(versions):
            seen.append(wanted(versions))
    return seen


def test_what_does_best_on_held_out_rows_serves_and_the_newest_where_that_is_preferred() -> None:
    log = measured_run(BEST_IN_THE_MIDDLE, JOB).log
    assert follow(Versions(), log) == [None, "demo@1", "demo@2"]
    assert follow(Versions(prefer="newest"), log)[-1] == "demo@5"
    asked = Versions()
    follow(asked, log)
    assert asked.of("demo").name == "demo@2"
    assert asked.of("demo", 3).name == "demo@3"


def test_the_next_best_serves_where_the_store_has_the_best_no_more() -> None:
    versions = Versions()
    follow(versions, measured_run(BEST_IN_THE_MIDDLE, JOB).log)
    best = versions.wanted()
    assert best is not None
    assert versions.miss(best)
    assert wanted(versions) == "demo@3"
    newest = Versions(prefer="newest")
    follow(newest, measured_run(BEST_IN_THE_MIDDLE, JOB).log)
    last = newest.wanted()
    assert last is not None
    assert not newest.miss(last)


def test_after_a_restart_what_served_serves_until_the_log_is_read() -> None:
    versions = Versions(served=digest("a", 2))
    for number, round in enumerate((1, 2, 3), 1):
        keep(versions, "a", round, number)
    assert wanted(versions) == "a@2"
    versions.history_read()
    assert wanted(versions) == "a@3"


def test_the_best_of_an_epoch_serves_until_the_next_has_a_version() -> None:
    run = measured_run(BEST_IN_THE_MIDDLE, a_job(rounds=4, evaluate_every=1, epochs=2))
    versions = Versions()
    follow(versions, run.log)
    done = len(run.log)
    run.open_epoch(run.next_epoch())
    assert follow(versions, run.log, done) == ["demo@2"]
    done = len(run.log)
    moved(run)
    assert isinstance(run.log[-2], ModelPublished)
    assert follow(versions, run.log, done)[-1] == f"demo@{run.log[-2].round}"


def test_what_the_store_lacked_for_a_moment_serves_all_the_same_once_it_is_here() -> None:
    log = measured_run(BEST_IN_THE_MIDDLE, JOB).log
    versions = Versions()
    follow(versions, log)
    best = versions.wanted()
    assert best is not None
    assert versions.miss(best)
    versions.keep(best, SPEC, b"m")
    assert versions.wanted() == best


def test_follow_goes_with_the_newest_even_before_the_log_is_read() -> None:
    versions = Versions(pin=Pin("a", 1), served=digest("a", 1))
    for number, round in enumerate((1, 2), 1):
        keep(versions, "a", round, number)
    assert wanted(versions) == "a@1"
    versions.follow()
    assert wanted(versions) == "a@2"


def test_a_best_of_long_ago_is_known_whether_the_service_has_run_since_or_not() -> None:
    figures = [(25, 140.0), (90, 40.0), *[(50, 90.0)] * 80]
    log = measured_run(figures, a_job(rounds=81, evaluate_every=1)).log
    live = Versions()
    follow(live, log)
    assert wanted(live) == "demo@1"
