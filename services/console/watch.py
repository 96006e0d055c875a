"""A job as it goes: a bar and a curve for people, a line a round in a pipe, JSON for programs."""

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import aclosing

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from services.console import listing
from services.console.client import ask
from services.console.failure import Failure
from services.console.printing import Printer
from services.console.progress import Progress
from services.console.sparkline import bars_for, sparkline
from services.console.waiting import Waiting
from shared import subjects
from shared.bus import Bus, Link
from shared.codec import decode
from shared.errors import MalformedMessage, TransientError
from shared.jetstream_api import NoResponders
from shared.log import follow
from shared.messages import DecisionMade, EpochOpened, JobsListed, ListJobs, LogEvent, RoundClosed

CHECK_S = 5.0
QUIET_S = 8.0
"""How often it is asked what keeps the devices: without a word from any, or when a round waits."""

Tell = Callable[[str], None]


async def watch(bus: Link, job: str, printer: Printer) -> Progress:
    """Show the job's facts from its first to its end, and return what came of it.

    Raises:
        Failure: there is no such job, or the broker closed the connection.
    """
    await _must_exist(bus, job)
    progress, waiting = Progress(job), Waiting(job)
    if printer.as_json:
        await _take(bus, progress, waiting, printer.line)
    elif printer.people.is_terminal:
        await _on_a_board(bus, progress, waiting, printer.people)
    else:
        await _attended(
            bus, progress, waiting, lambda event: _print_round(event, progress, printer),
            printer.remark,
        )  # fmt: skip
    if progress.ended is None:
        raise Failure(f"the connection ended before job {job} did")
    if not printer.as_json:
        _conclude(progress, printer)
        if progress.kept is not None:  # in one line, to be copied
            digest = progress.kept.snapshot.digest
            printer.remark(f"seedwire blob get {digest} {job}.snapshot")
    return progress


def _conclude(progress: Progress, printer: Printer) -> None:
    """Say what came of a job: a table in a terminal, a line each in a pipe."""
    rows = progress.summary()
    name, curve = progress.curve()
    if len(curve) > 1:
        bars = bars_for(printer.people.encoding)
        rows.append((f"{name}, by round", sparkline(curve, bars=bars)))
    if not printer.people.is_terminal:
        for name, value in rows:
            printer.remark(f"{progress.job} {name}: {value}")
        return
    table = Table(title=f"job {progress.job}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    printer.people.print(table)


class Board:
    """What a terminal shows: the bar, the curve below it, and what the round waits for."""

    def __init__(self, progress: Progress, bars: str) -> None:
        self._progress = progress
        self._bars = bars
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self._task = self._bar.add_task(progress.job, total=None, line="")
        self.remark = ""

    def evolve(self, event: LogEvent) -> None:
        """The job has a new fact, which its progress knows by now."""
        if isinstance(event, RoundClosed):
            self.remark = ""
        progress = self._progress
        if isinstance(event, EpochOpened) and event.epoch:
            self.remark = progress.epoch_line()
        total, line = progress.rounds or None, progress.line()
        done = progress.closed - progress.closed_before
        self._bar.update(self._task, completed=done, total=total, line=line)

    def tell(self, text: str) -> None:
        """Show `text` until the next round closes."""
        self.remark = text

    def __rich__(self) -> RenderableType:
        name, curve = self._progress.curve()
        lines: list[RenderableType] = [self._bar.get_renderable()]
        if len(curve) > 1:
            lines.append(Text(f"{name} {sparkline(curve, bars=self._bars)} {curve[-1]:.4f}"))
        if self.remark:
            lines.append(Text(self.remark, style="yellow"))
        return Group(*lines)


async def _on_a_board(bus: Link, progress: Progress, waiting: Waiting, console: Console) -> None:
    board = Board(progress, bars_for(console.encoding))
    with Live(board, console=console, refresh_per_second=4):
        await _attended(bus, progress, waiting, board.evolve, board.tell)


async def _attended(
    bus: Link, progress: Progress, waiting: Waiting, show: Callable[[LogEvent], None], tell: Tell
) -> None:
    """Follow the job; whenever it stands still, `tell` why."""
    async with asyncio.TaskGroup() as tasks:
        attendants = [
            tasks.create_task(_explain(bus, progress, waiting, tell)),
            tasks.create_task(_hear(bus, waiting)),
        ]
        await _take(bus, progress, waiting, show)
        for attendant in attendants:
            attendant.cancel()


async def _take(
    bus: Link, progress: Progress, waiting: Waiting, show: Callable[[LogEvent], None]
) -> None:
    """Follow the log until the job has ended."""
    now = asyncio.get_running_loop().time
    async with aclosing(follow(bus, bus, progress.job, check_s=CHECK_S)) as events:
        async for _, event in events:
            progress.evolve(event)
            waiting.evolve(event, now())
            show(event)
            if progress.ended is not None:
                return


def _print_round(event: LogEvent, progress: Progress, printer: Printer) -> None:
    if isinstance(event, RoundClosed):
        printer.remark(f"{progress.job} {progress.close_line()}")
    elif isinstance(event, EpochOpened) and event.epoch:
        printer.remark(f"{progress.job} {progress.epoch_line()}")


async def _hear(bus: Bus, waiting: Waiting) -> None:
    """Keep who is given work, until cancelled."""
    now = asyncio.get_running_loop().time
    async with bus.subscribe(subjects.decision(waiting.job)) as deliveries:
        async for delivery in deliveries:
            with contextlib.suppress(MalformedMessage):
                waiting.decided(decode(delivery.data, DecisionMade), now())


async def _explain(bus: Bus, progress: Progress, waiting: Waiting, tell: Tell) -> None:
    """Say what keeps the devices, whenever that changes: all of them at first, then a round's."""
    now = asyncio.get_running_loop().time
    said: object = None
    while True:
        await asyncio.sleep(QUIET_S)
        if progress.waits:
            if said != progress.epoch:
                tell(
                    f"epoch {progress.epoch + 1} of {progress.epochs} is done, and the job waits "
                    f"for the next: `seedwire distil {progress.job}` opens it, `seedwire job stop "
                    f"{progress.job}` ends the job"
                )
                said = progress.epoch
        elif progress.untouched:
            why = await _why_quiet(bus, progress.job)
            if why != said and progress.untouched:
                tell(f"no device has sent anything yet: {why}")
                said = why
        elif waiting.long(now()):
            with contextlib.suppress(Failure):
                asked = now()
                whom = waiting.for_whom(await listing.devices(bus), asked)
                if waiting.long(now()) and (waiting.since, whom.keys()) != said:
                    tell(waiting.told(whom, now()))
                    said = (waiting.since, whom.keys())


async def _why_quiet(bus: Bus, job: str) -> str:
    try:
        devices = await listing.devices(bus)
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
