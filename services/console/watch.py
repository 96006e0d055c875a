"""A job as it goes: a bar for people, a line a round where nobody looks, JSON for programs."""

import sys
from collections.abc import Callable
from contextlib import aclosing

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from services.console.client import ask
from services.console.failure import Failure
from services.console.progress import Progress
from shared import subjects
from shared.bus import Link
from shared.errors import TransientError
from shared.log import follow
from shared.messages import JobsListed, ListJobs, LogEvent, RoundClosed

CHECK_S = 5.0


async def watch(bus: Link, job: str, *, as_json: bool, console: Console) -> Progress:
    """Show the job's facts from its first to its end, and return what came of it.

    Raises:
        Failure: there is no such job, or the broker closed the connection.
    """
    await _must_exist(bus, job)
    progress = Progress(job)
    if as_json:
        await _take(bus, progress, _print_json)
    elif console.is_terminal:
        await _with_bar(bus, progress, console)
    else:
        await _take(bus, progress, lambda event: _print_round(event, progress, console))
    if progress.ended is None:
        raise Failure(f"the connection ended before job {job} did")
    if not as_json:
        console.print(summary(progress))
    return progress


def summary(progress: Progress) -> Table:
    """What came of a job."""
    table = Table(title=f"job {progress.job}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in progress.summary():
        table.add_row(name, value)
    return table


async def _take(bus: Link, progress: Progress, show: Callable[[LogEvent], None]) -> None:
    """Follow the log until the job has ended."""
    async with aclosing(follow(bus, bus, progress.job, check_s=CHECK_S)) as events:
        async for _, event in events:
            progress.evolve(event)
            show(event)
            if progress.ended is not None:
                return


async def _with_bar(bus: Link, progress: Progress, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(progress.job, total=None, line="")
        await _take(
            bus,
            progress,
            lambda _: bar.update(
                task,
                completed=progress.closed,
                total=progress.rounds or None,
                line=progress.line(),
            ),
        )


def _print_round(event: LogEvent, progress: Progress, console: Console) -> None:
    if isinstance(event, RoundClosed):
        console.print(f"{progress.job} round {event.round}: {progress.line()}", soft_wrap=True)


def _print_json(event: LogEvent) -> None:
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


async def _must_exist(bus: Link, job: str) -> None:
    try:
        if await bus.get_last(subjects.LOG_STREAM, subjects.log(job)) is not None:
            return
    except TransientError as error:
        raise Failure(f"the job log cannot be read: {error}") from error
    listed = await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed)
    names = ", ".join(sorted(one.job for one in listed.jobs)) or "none"
    raise Failure(f"no job is called {job}; jobs: {names}")
