"""Jobs and devices as tables."""

from contextlib import aclosing

from rich.table import Table

from services.console.client import ask
from shared import log, subjects
from shared.bus import Bus, Link
from shared.messages import (
    DevicesListed,
    DeviceSummary,
    JobOpened,
    JobsListed,
    JobSummary,
    ListDevices,
    ListJobs,
)

DIGEST_SHOWN = 12
AWAY_S = 30 * 60.0
"""A device reports every 15 minutes: one that has been silent for longer takes part in nothing."""


async def jobs(bus: Link) -> Table:
    """What the aggregator knows of its jobs.

    Raises:
        Failure: no aggregator answers.
    """
    listed = await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed)
    table = Table("job", "status", "round", "held-out loss", "accuracy", "adapter")
    for job in sorted(listed.jobs, key=lambda job: job.job):
        status = f"{job.status} ({job.reason})" if job.reason else job.status
        table.add_row(
            job.job,
            status,
            f"{min(job.round, job.rounds)}/{job.rounds}",
            "-" if job.loss is None else f"{job.loss:.4f}",
            await _accuracy(bus, job),
            job.digest[:DIGEST_SHOWN],
        )
    return table


async def devices(bus: Bus) -> Table:
    """What the scheduler knows of its devices.

    Raises:
        Failure: no scheduler answers.
    """
    table = Table("device", "seen", "job", "doing", "rows", "tokens/s", "rounds", "problem")
    for device in await known(bus):
        away = device.seen_s_ago > AWAY_S
        table.add_row(
            device.device,
            f"{ago(device.seen_s_ago)}{', away' if away else ''}",
            device.job,
            device.doing,
            str(device.rows),
            f"{device.tokens_per_s:.0f}" if device.tokens_per_s else "-",
            str(device.rounds),
            device.problem,
            style="dim" if away else None,
        )
    return table


async def known(bus: Bus) -> list[DeviceSummary]:
    """The scheduler's devices, by name.

    Raises:
        Failure: no scheduler answers.
    """
    listed = await ask(bus, subjects.DEVICE_LIST, ListDevices(), DevicesListed)
    return sorted(listed.devices, key=lambda device: device.device)


def ago(seconds: float) -> str:
    """How long ago something was, in the unit that suits it."""
    for size_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


async def _accuracy(bus: Link, job: JobSummary) -> str:
    """As a percentage, where the job's task has right answers: its first fact says so."""
    if job.accuracy is None:
        return "-"
    facts = log.read(bus, subjects.LOG_STREAM, subjects.log(job.job))
    async with aclosing(facts):
        _, opened = await anext(facts, (0, None))
    has_answers = isinstance(opened, JobOpened) and opened.spec.task.loss != "tokens"
    return f"{job.accuracy:.1%}" if has_answers else "-"
