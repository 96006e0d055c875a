"""What fleets on brokers of every kind must come to, and disks with little room."""

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.demo.witness import Verdict, examine
from shared.messages import JobEnded, LogEvent, RoundClosed
from tests.support.fleet import Fleet
from tests.support.waiting import wait_until


async def reaches_round(fleet: Fleet, job: str, number: int) -> list[LogEvent]:
    """The job's facts up to the close of round `number`."""
    return await fleet.events_until(
        job, lambda event: isinstance(event, RoundClosed) and event.round >= number
    )


async def ends_whole(fleet: Fleet, job: str, rounds: int) -> Verdict:
    """The job ends as if nothing had happened, by the witness and by every device."""
    events = await fleet.events_until(job)
    end = events[-1]
    assert isinstance(end, JobEnded)
    closes = [event for event in events if isinstance(event, RoundClosed)]
    assert sum(close.commit is not None for close in closes) == rounds
    assert [close.round for close in closes] == list(range(1, len(closes) + 1)), "a gap"

    def alike() -> bool:
        ends = {fleet.positions.get(f"{job}/{name}", "").split(":")[-1] for name in fleet.devices}
        return ends == {end.digest}

    await wait_until(alike, timeout_s=30, what=f"all at {end.digest[:12]}: {fleet.positions}")
    # What was sent into the failure is sent again some ten seconds later, also after the end.
    await wait_until(
        lambda: not any(any(path.parent.glob("*.update")) for path in fleet.ledgers()),
        timeout_s=60,
        what="every update is settled",
    )
    verdict = await examine(fleet.servers[0], job, fleet.ledgers())
    assert verdict.clean, verdict
    assert verdict.final_digest == end.digest
    return verdict


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Generator[Path, None, None]:
    """A file system of its own with little room; the test is skipped where none may be made."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ("-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs")
    try:
        made = subprocess.run(["mount", *options, folder], capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip("no right to make a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], capture_output=True, check=True)


def fill(folder: Path) -> Path:
    """No byte more fits the file system; the file that sees to it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1024 * 1024, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return ballast
