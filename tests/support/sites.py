"""Fleets on brokers of every kind: a cluster's, one with little room, one with sites of its own."""

import asyncio
import json
import subprocess
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from deploy.demo.witness import Verdict, examine
from shared import nats_bus
from shared.broker import BrokerProcess
from shared.messages import Evaluation, JobEnded, JobSpec, LogEvent, Pacing, RoundClosed, Tuning
from tests.support.fleet import Fleet, a_task
from tests.support.waiting import wait_until


def a_spec(rounds: int, *, deadline_s: float = 5.0) -> JobSpec:
    """Rounds that want both of two devices."""
    return JobSpec(
        task=a_task(),
        tuning=Tuning(
            how="exact",
            rounds=rounds,
            directions=64,
            batch_rows=1000,
            normalise="rms",
            step=0.3,
            eps=0.05,
        ),
        pacing=Pacing(enough_devices=2, enough_probes=64, deadline_s=deadline_s),
        evaluation=Evaluation(every_rounds=5),
        snapshot_every=5,
    )


@asynccontextmanager
async def fleet_on(
    broker: BrokerProcess,
    folder: Path,
    *,
    servers: list[str] | None = None,
    service_options: tuple[str, ...] = (),
) -> AsyncGenerator[Fleet, None]:
    """Aggregator and scheduler on a broker that runs; a test starts its devices itself."""
    path = folder / "model.json"
    path.write_text(json.dumps({}))
    addresses = servers or []
    bus = await nats_bus.connect(addresses or [broker.url], name="test")
    fleet = Fleet(folder, broker, bus, path, addresses=addresses)
    fleet.hearing = hearing = asyncio.create_task(fleet.hear())
    try:
        for name in ("aggregator", "scheduler"):
            await fleet.start_service(name, *service_options)
        yield fleet
    finally:
        for child in [*fleet.devices.values(), *fleet.services.values()]:
            await child.stop()
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        await bus.close()


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
