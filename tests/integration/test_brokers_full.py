"""Disks that fill in the middle of a job: the broker's, its quota, a device's."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.demo.processes import ROOT
from shared import subjects
from shared.broker import BrokerProcess, start_broker
from shared.codec import decode
from shared.errors import TransientError
from shared.log import ensure_streams, read_patiently
from shared.log_writer import LogWriter
from shared.messages import DeviceReport, JobEnded, ServiceReport
from shared.nats_bus import NatsBus, connect
from tests.support.cluster import Cluster, in_step, start_cluster
from tests.support.fleet import Fleet, a_spec, fleet_on
from tests.support.sites import ends_whole, fill, reaches_round, small_disk
from tests.support.waiting import wait_until

OPTIONS = ("--report-every-s", "0.2")
ROUNDS = 120
"""More than are over before what a test does takes effect."""
LOG = subjects.LOG_STREAM
QUOTA = """\
jetstream {{
  store_dir: "{store}"
  sync_interval: always
  max_memory_store: 512MB
  max_file_store: 4MB
}}
"""


@asynccontextmanager
async def a_running_job(broker: BrokerProcess, folder: Path) -> AsyncGenerator[Fleet, None]:
    """Two devices in the middle of a job of ROUNDS rounds."""
    async with fleet_on(broker, folder, service_options=OPTIONS) as fleet:
        for name in ("d0", "d1"):
            await fleet.start_device(name, trusted=name == "d0")
        await fleet.submit(fleet.job("demo", a_spec(ROUNDS)))
        await reaches_round(fleet, "demo", 5)
        yield fleet


async def aggregator_says(fleet: Fleet, *words: str) -> ServiceReport:
    """Its first report whose problem has all `words`, or that has none where there are no words."""
    async with (
        asyncio.timeout(40),
        fleet.bus.subscribe(subjects.service("aggregator")) as reports,
    ):
        async for delivery in reports:
            report = decode(delivery.data, ServiceReport)
            if all(word in report.problem for word in words) and bool(words) == bool(
                report.problem
            ):
                return report
    raise AssertionError("the bus was closed")


async def use_up(fleet: Fleet) -> None:
    """The quota has no room for as much as an event."""
    for size in (100_000, 5_000, 50):
        with contextlib.suppress(TransientError):
            for number in range(1000):
                subject = subjects.blob("0" * 64, size + number)
                await fleet.bus.append(subject, bytes(size), stream=subjects.BLOBS_STREAM)


async def blob_put(fleet: Fleet, file: Path) -> tuple[int, str]:
    """What `seedwire blob put` comes to: its exit code and all it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.console", "blob", "put", str(file)),
        *("--servers", fleet.broker.url),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, " ".join(said.decode().split())


async def test_a_job_waits_while_the_brokers_quota_is_used_up(tmp_path: Path) -> None:
    """And goes on by itself with the first room there is."""
    store = tmp_path / "nats"
    async with (
        start_broker(store, security=QUOTA.format(store=store)) as broker,
        a_running_job(broker, tmp_path) as fleet,
    ):
        aggregator = fleet.services["aggregator"].process
        await use_up(fleet)
        report = await aggregator_says(fleet, "is full", "max_file_store")
        assert report.counters["appends_failed"] > 0
        file = tmp_path / "model.gguf"
        file.write_bytes(os.urandom(300_000))
        code, said = await blob_put(fleet, file)
        assert code != 0
        assert "max_file_store" in said
        assert "the same command goes on with it" in said
        await fleet.bus.purge(subjects.BLOBS_STREAM, subjects.ALL_BLOBS)
        await aggregator_says(fleet)
        await ends_whole(fleet, "demo", ROUNDS)
        assert fleet.services["aggregator"].process is aggregator
        assert fleet.services["aggregator"].running


async def test_a_job_outlives_the_brokers_full_disk(tmp_path: Path) -> None:
    """nats-server writes again once it was restarted: by Kubernetes, or by whoever reads of it."""
    with small_disk(tmp_path / "nats", 32) as store:
        async with start_broker(store) as broker, a_running_job(broker, tmp_path) as fleet:
            ballast = fill(store)
            report = await aggregator_says(fleet, "its disk is full", "restart it")
            assert report.counters["appends_failed"] > 0
            file = tmp_path / "model.gguf"
            file.write_bytes(os.urandom(300_000))
            code, said = await blob_put(fleet, file)
            assert code != 0
            assert "disk is full, make room there and restart it" in said
            ballast.unlink()
            await broker.stop()
            await broker.start()
            await aggregator_says(fleet)
            await ends_whole(fleet, "demo", ROUNDS)
            assert fleet.services["aggregator"].running


async def test_a_device_with_a_full_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, broker: BrokerProcess
) -> None:
    with small_disk(tmp_path / "state" / "d1", 4) as state:
        async with a_running_job(broker, tmp_path) as fleet:
            async with fleet.bus.subscribe(subjects.report("d1")) as reports, asyncio.timeout(30):
                ballast = fill(state)
                said = decode((await anext(reports)).data, DeviceReport)
                while "spool full" not in said.problem:
                    said = decode((await anext(reports)).data, DeviceReport)
            assert said.counters["spool_full"] > 0
            ballast.unlink()
            await ends_whole(fleet, "demo", ROUNDS)
            assert fleet.devices["d1"].running


@pytest.mark.slow
async def test_one_server_of_a_cluster_with_a_full_disk_holds_up_nobody_for_long(
    tmp_path: Path,
) -> None:
    """It puts its JetStream out of service, and another leads; restarted with room, it catches up.

    What Kubernetes' liveness probe asks of it (`js-enabled-only`) says so.
    """
    with small_disk(tmp_path / "node-0", 16) as store:
        async with start_cluster(tmp_path) as cluster:
            bus = await connect(cluster.servers[1:], name="test", timeout_s=2.0)
            await ensure_streams(bus, 3)
            writer = await LogWriter.open(bus, LOG)
            for number in range(1, 4):
                await wait_until(lambda: in_step(bus, LOG), timeout_s=30)
                event = JobEnded(job="a", epoch=0, round=number, reason="finished", digest="0" * 64)
                if number == 2:
                    await led_by_first(cluster, bus)
                    ballast = fill(store)
                    for _ in range(100):  # more than a page: what is left of it is no room
                        async with asyncio.timeout(60):
                            await writer.append("a", event)
                    assert await cluster.leader(bus, LOG) != 0
                    ballast.unlink()
                    await cluster.nodes[0].kill()
                    await cluster.nodes[0].start()
                else:
                    await writer.append("a", event)
            async with asyncio.timeout(60):  # any replica answers, the newly started one too
                history = read_patiently(bus, LOG, subjects.ALL_LOGS, up_to=102)
                stored = [sequence async for sequence, _ in history]
            assert stored == list(range(1, 103))
            await bus.close()


async def led_by_first(cluster: Cluster, bus: NatsBus) -> None:
    """LOG's leader is node 0, whose disk is small."""
    wish = b'{"placement": {"preferred": "node-0"}}'
    async with asyncio.timeout(60):
        while await cluster.leader(bus, LOG) != 0:
            await bus.ask("$JS.API.STREAM.LEADER.STEPDOWN." + LOG, wish, timeout_s=5.0)
            await asyncio.sleep(1)
