"""Jobs and devices as tables."""

from rich.table import Table

from services.console.client import ask
from shared import subjects
from shared.bus import Bus
from shared.messages import DevicesListed, JobsListed, ListDevices, ListJobs

DIGEST_SHOWN = 12


async def jobs(bus: Bus) -> Table:
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
            "-" if job.accuracy is None else f"{job.accuracy:.1%}",
            job.digest[:DIGEST_SHOWN],
        )
    return table


async def devices(bus: Bus) -> Table:
    """What the scheduler knows of its devices.

    Raises:
        Failure: no scheduler answers.
    """
    listed = await ask(bus, subjects.DEVICE_LIST, ListDevices(), DevicesListed)
    table = Table("device", "seen", "job", "doing", "rows", "tokens/s", "rounds", "problem")
    for device in sorted(listed.devices, key=lambda device: device.device):
        table.add_row(
            device.device,
            f"{device.seen_s_ago:.0f} s ago",
            device.job,
            device.doing,
            str(device.rows),
            f"{device.tokens_per_s:.0f}" if device.tokens_per_s else "-",
            str(device.rounds),
            device.problem,
        )
    return table
