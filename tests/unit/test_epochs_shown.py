"""What people see of a job's epochs: telemetry and the console, from the facts of a real log."""

from msgspec.structs import replace

from services.console import listing
from services.console.printing import Console
from services.console.progress import Progress
from services.telemetry.metrics import exposition
from services.telemetry.state import State
from shared.messages import Distilled, EpochOpened, LogEvent
from tests.support.jobs import a_job, a_probe
from tests.support.runs import Run

FIGURES = Distilled(
    alpha=1.0,
    rows=200,
    heldout_rows=50,
    tokens=9000,
    steps=40,
    teacher_entropy_before=1.25,
    teacher_entropy_after=1.125,
    kl_before=0.5,
    kl_after=0.25,
    held_out_loss_before=2.5,
    held_out_loss_after=2.25,
    ensemble_loss_before=2.0,
)


def an_epoch(run: Run) -> None:
    while run.state.open is not None:
        run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))


def two_epochs() -> tuple[list[LogEvent], Run]:
    """The log of a job that waits for its second epoch, and the job when that is two rounds old."""
    submit = a_job(rounds=3)
    run = Run(replace(submit, spec=replace(submit.spec, epochs=2)))
    run.overdue()  # an abandoned round is none of those planned
    an_epoch(run)
    waiting = list(run.log)
    run.open_epoch(replace(run.next_epoch(), distilled=FIGURES))
    for _ in range(2):
        run.send(a_probe(run.opened, "a"), a_probe(run.opened, "b", first=8))
    return waiting, run


def test_telemetry_tells_that_a_job_waits_and_how_its_epoch_was_made() -> None:
    waiting, run = two_epochs()
    known = State()

    def samples() -> list[str]:
        return [line for line in exposition(known, {}).decode().splitlines() if line[:1] != "#"]

    for event in waiting:
        known.on_event(event)
    job = known.jobs["demo"]
    assert (job.status, job.epoch, job.epochs, job.distilled) == ("waiting", 0, 2, None)
    assert 'seedwire_job_waiting{job="demo"} 1.0' in samples()
    assert not [line for line in samples() if "distilled" in line]
    for event in run.log[len(waiting) :]:
        known.on_event(event)
    assert (job.status, job.epoch, job.rounds_before) == ("running", 1, 3)
    assert job.summary()["distilled"] == FIGURES
    told = samples()
    assert 'seedwire_job_waiting{job="demo"} 0.0' in told
    assert 'seedwire_job_epoch{job="demo"} 1.0' in told
    assert 'seedwire_job_distilled_teacher_entropy_after{job="demo"} 1.125' in told
    assert 'seedwire_job_distilled_held_out_loss_after{job="demo"} 2.25' in told
    assert not [line for line in told if "ensemble_loss_after" in line]  # nobody measured it


def test_who_watches_sees_that_it_waits_and_what_the_next_epoch_begins_with() -> None:
    waiting, run = two_epochs()
    progress = Progress("demo")
    seen: list[bool] = []
    for event in waiting:
        progress.evolve(event)
        seen.append(progress.waits)
    assert seen == [*[False] * (len(seen) - 1), True]
    for event in run.log[len(waiting) :]:
        progress.evolve(event)
        if isinstance(event, EpochOpened):
            assert progress.epoch_line() == (
                "epoch 2 begins distilled: held-out loss 2.5000 -> 2.2500, ensemble's loss "
                "2.0000 -> -, teacher's entropy 1.2500 -> 1.1250"
            )
    assert not progress.waits
    assert progress.closed - progress.closed_before == 2
    assert ("epochs", "2 of 2") in progress.summary()
    paper = Console(width=120, record=True, quiet=True)
    with paper.capture() as captured:
        paper.quiet = False
        paper.print(listing.jobs_table([run.state.summary()]))
    assert "running, epoch 2 of 2" in captured.get()
