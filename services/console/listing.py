"""Jobs and devices as the services know them, and as tables."""

from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from rich.table import Table

from services.console.client import ask
from shared import log, subjects
from shared.bus import Bus, Link
from shared.messages import (
    DevicesListed,
    DeviceSummary,
    JobOpened,
    JobsListed,
    JobSpec,
    JobSummary,
    ListDevices,
    ListJobs,
)

DIGEST_SHOWN = 12
AWAY_S = 30 * 60.0
"""A device reports every 15 minutes: one that has been silent for longer takes part in nothing."""


async def jobs(bus: Link) -> list[JobSummary]:
    """What the aggregator knows of its jobs, by name; no accuracy where it means nothing.

    Raises:
        Failure: no aggregator answers.
    """
    listed = await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed)
    found = sorted(listed.jobs, key=lambda job: job.job)
    return [
        job if job.accuracy is None or await _has_answers(bus, job.job) else _blind(job)
        for job in found
    ]


def jobs_table(jobs: Sequence[JobSummary]) -> Table:
    """A row for each job."""
    table = Table("job", "status", "round", "held-out loss", "accuracy", "adapter")
    for job in jobs:
        status = f"{job.status} ({job.reason})" if job.reason else job.status
        if job.epochs > 1:
            status += f", epoch {job.epoch + 1} of {job.epochs}"
        table.add_row(
            job.job,
            status,
            f"{min(job.round, job.rounds)}/{job.rounds}" if not job.epoch else str(job.round),
            "-" if job.loss is None else f"{job.loss:.4f}",
            "-" if job.accuracy is None else f"{job.accuracy:.1%}",
            job.digest[:DIGEST_SHOWN],
        )
    return table


async def devices(bus: Bus) -> list[DeviceSummary]:
    """The scheduler's devices, by name.

    Raises:
        Failure: no scheduler answers.
    """
    listed = await ask(bus, subjects.DEVICE_LIST, ListDevices(), DevicesListed)
    return sorted(listed.devices, key=lambda device: device.device)


def away(device: DeviceSummary) -> bool:
    """Whether it has been silent for so long that it takes part in nothing."""
    return device.seen_s_ago > AWAY_S


def devices_table(devices: Sequence[DeviceSummary]) -> Table:
    """A row for each device; those that are away are dim."""
    table = Table("device", "seen", "job", "doing", "rows", "tokens/s", "rounds", "problem")
    for device in devices:
        table.add_row(
            device.device,
            f"{ago(device.seen_s_ago)}{', away' if away(device) else ''}",
            device.job,
            device.doing,
            _rows(device),
            f"{device.tokens_per_s:.0f}" if device.tokens_per_s else "-",
            str(device.rounds),
            device.problem,
            style="dim" if away(device) else None,
        )
    return table


def _rows(device: DeviceSummary) -> str:
    """How many it has, and how many more it cannot use."""
    refused = device.rows_refused
    return f"{device.rows}, {refused} refused" if refused else str(device.rows)


def ago(seconds: float) -> str:
    """How long ago something was, in the unit that suits it."""
    for size_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


async def spec_of(bus: Link, job: str) -> JobSpec | None:
    """The job's settings, which its first fact tells."""
    facts = log.read(bus, subjects.LOG_STREAM, subjects.log(job))
    async with aclosing(facts):
        _, opened = await anext(facts, (0, None))
    return opened.spec if isinstance(opened, JobOpened) else None


async def _has_answers(bus: Link, job: str) -> bool:
    """Whether the job's task has right answers."""
    spec = await spec_of(bus, job)
    return spec is not None and spec.task.loss != "tokens"


def _blind(job: JobSummary) -> JobSummary:
    return msgspec.structs.replace(job, accuracy=None)
