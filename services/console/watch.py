"""A job as it goes: a bar for people, a line a round where nobody looks, JSON for programs."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from contextlib import aclosing

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from services.console import listing
from services.console.client import ask
from services.console.failure import Failure
from services.console.progress import Progress
from shared import subjects
from shared.bus import Bus, Link
from shared.errors import TransientError
from shared.jetstream_api import NoResponders
from shared.log import follow
from shared.messages import JobsListed, ListJobs, LogEvent, RoundClosed

CHECK_S = 5.0
QUIET_S = 8.0
"""After so long without a word from any device, and then as often, it is asked why."""


async def watch(bus: Link, job: str, *, as_json: bool, console: Console) -> Progress:
    """Show the job's facts from its first to its end, and return what came of it.

    Raises:
        Failure: there is no such job, or the broker closed the connection.
    """
    await _must_exist(bus, job)
    progress = Progress(job)
    if as_json:
        await _take(bus, progress, _print_json)
    else:
        async with asyncio.TaskGroup() as tasks:
            explaining = tasks.create_task(_explain(bus, progress, console))
            if console.is_terminal:
                await _with_bar(bus, progress, console)
            else:
                await _take(bus, progress, lambda event: _print_round(event, progress, console))
            explaining.cancel()
    if progress.ended is None:
        raise Failure(f"the connection ended before job {job} did")
    if not as_json:
        console.print(summary(progress))
        if progress.published is not None:  # in one line, to be copied
            digest = progress.published.snapshot.digest
            console.print(f"seedwire blob get {digest} {job}.snapshot", soft_wrap=True)
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
        console.print(f"{progress.job} {progress.close_line()}", soft_wrap=True)


async def _explain(bus: Bus, progress: Progress, console: Console) -> None:
    """Until the first device has sent something, say what keeps them, whenever that changes."""
    said = ""
    while True:
        await asyncio.sleep(QUIET_S)
        if not progress.untouched:
            return
        why = await _why_quiet(bus, progress.job)
        if why != said and progress.untouched:
            console.print(f"no device has sent anything yet: {why}", soft_wrap=True, markup=False)
            said = why


async def _why_quiet(bus: Bus, job: str) -> str:
    try:
        devices = await listing.known(bus)
    except Failure as failure:
        return str(failure)
    troubled = [device for device in devices if device.problem]
    parts = [
        f"{len(devices)} known",
        f"{sum(bool(device.doing) for device in devices)} at work",
        f"{len(troubled)} with a problem",
    ]
    if troubled:
        parts[-1] += f", e.g. {troubled[0].device}: {troubled[0].problem}"
    return f"{', '.join(parts)}; see `seedwire devices`; `seedwire job stop {job}` ends the job"


def _print_json(event: LogEvent) -> None:
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


async def _must_exist(bus: Link, job: str) -> None:
    try:
        with contextlib.suppress(NoResponders):  # no aggregator has been there to make the log
            if await bus.get_last(subjects.LOG_STREAM, subjects.log(job)) is not None:
                return
    except TransientError as error:
        raise Failure(f"the job log cannot be read: {error}") from error
    listed = await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed)
    names = ", ".join(sorted(one.job for one in listed.jobs)) or "none"
    raise Failure(f"no job is called {job}; jobs: {names}")
