"""A cluster of three nats-servers under a fleet: its servers die, lag and are cut off."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from deploy.demo.processes import ROOT
from shared import jetstream, subjects
from shared.broker import BrokerProcess
from shared.bus import SequenceMismatch
from shared.errors import ConfigError, Fenced, TransientError
from shared.log import ensure_streams, follow, read, read_patiently
from shared.log_writer import LogWriter
from shared.messages import JobEnded, RoundClosed
from shared.nats_bus import NatsBus, connect
from shared.patience import patiently
from shared.runtime import EXIT_CONFIG
from tests.support.cluster import SERVERS, Cluster, in_step, start_cluster, stream_info
from tests.support.fleet import a_spec, fleet_on
from tests.support.sites import ends_whole, reaches_round
from tests.support.waiting import wait_until

R3 = ("--stream-replicas", "3")
LOG = subjects.LOG_STREAM


def an_event(number: int) -> JobEnded:
    return JobEnded(job="a", epoch=0, round=number, reason="finished", digest="0" * 64)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncGenerator[Cluster, None]:
    async with start_cluster(tmp_path / "nats") as cluster:
        yield cluster


@pytest.fixture
async def link(
    cluster: Cluster,
) -> AsyncGenerator[Callable[..., "asyncio.Future[NatsBus]"], None]:
    """Connections to the nodes named, or to all; closed at the end."""
    async with AsyncExitStack() as stack:

        async def to(*nodes: int) -> NatsBus:
            servers = [cluster.servers[node] for node in nodes or range(SERVERS)]
            bus = await connect(servers, name="test", timeout_s=2.0)
            stack.push_async_callback(bus.close)
            return bus

        yield lambda *nodes: asyncio.ensure_future(to(*nodes))


Link = Callable[..., "asyncio.Future[NatsBus]"]


async def test_rounds_go_on_whichever_server_dies(cluster: Cluster, tmp_path: Path) -> None:
    servers, rounds = cluster.servers, 300
    async with fleet_on(cluster.nodes[0], tmp_path, servers=servers, service_options=R3) as fleet:
        for name in ("d0", "d1"):
            await fleet.start_device(name, trusted=name == "d0")
        await fleet.submit(fleet.job("demo", a_spec(rounds)))
        bus = fleet.bus
        await reaches_round(fleet, "demo", 3)
        for _ in range(2):
            await wait_until(lambda: in_step(bus, LOG), timeout_s=30, what="all copies alike")
            victim = await cluster.leader(bus, LOG)
            await cluster.nodes[victim].kill()
            killed = time.monotonic()
            last = await newest_round(bus)
            assert last + 3 < rounds, "killed too late to show anything"
            # Past the round that was open at the kill, and what was on its way then.
            await reaches_round(fleet, "demo", last + 3)
            assert time.monotonic() - killed < 30
            await cluster.nodes[victim].start()
        for stream in (LOG, subjects.DETAIL_STREAM, subjects.UPDATES_STREAM):
            await wait_until(
                lambda stream=stream: in_step(bus, stream), timeout_s=30, what=f"{stream} alike"
            )
        verdict = await ends_whole(fleet, "demo", rounds)
        assert verdict.measured >= 2 * rounds
        assert all(child.running for child in fleet.services.values()), fleet.logs()


async def newest_round(bus: NatsBus) -> int:
    """The last that is closed, by any server that is there."""
    found = 0
    events = read_patiently(bus, LOG, subjects.log("demo"))
    async with aclosing(events):
        async for _, event in events:
            found = event.round if isinstance(event, RoundClosed) else found
    return found


async def test_copies_are_raised_and_never_lowered(link: Link) -> None:
    bus = await link()
    await ensure_streams(bus)
    writer = await LogWriter.open(bus, LOG)
    await writer.append("a", an_event(1))
    await ensure_streams(bus, 3)

    streams = (LOG, subjects.DETAIL_STREAM, subjects.UPDATES_STREAM, subjects.BLOBS_STREAM)
    for stream in streams:
        await wait_until(lambda stream=stream: in_step(bus, stream), timeout_s=20)
    await ensure_streams(bus, 1)
    configs = [await stream_info(bus, stream, "config") for stream in streams]
    assert [config["num_replicas"] for config in configs] == [3, 3, 3, 3]
    assert await writer.append("a", an_event(2)) == 2


async def test_more_copies_than_servers_is_the_operators_affair(
    link: Link, broker: BrokerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream, "PEERS_TRIES", 1)
    with pytest.raises(ConfigError, match="lower stream_replicas"):
        await ensure_streams(await link(), 5)
    arguments = ("-m", "services.aggregator", "--servers", broker.url, *R3)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        _, said = await process.communicate()
    assert process.returncode == EXIT_CONFIG
    assert b"lower stream_replicas" in said


async def test_a_server_that_lags_makes_no_reader_stop_early(cluster: Cluster, link: Link) -> None:
    """As an aggregator that restarts, and a device, beside a server that was cut off."""
    first = await link()
    await ensure_streams(first, 3)
    leader = await cluster.leader(first, LOG)
    behind, *others = [number for number in range(SERVERS) if number != leader]
    bus, stale = await link(leader, *others), await link(behind)
    writer = await LogWriter.open(bus, LOG)
    await writer.append("a", an_event(1))
    await wait_until(lambda: in_step(bus, LOG), timeout_s=20)
    async with aclosing(follow(stale, stale, "a")) as followed:
        assert (await anext(followed))[0] == 1
        await cut_off_serving(cluster, behind, stale)
        for number in range(2, 21):
            await writer.append("a", an_event(number))
        # The trap: this server ends the log early, and says that it is whole.
        assert [sequence async for sequence, _ in read(stale, LOG, subjects.log("a"))] == [1]
        whole = read_patiently(stale, LOG, subjects.log("a"), up_to=writer.last)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            reading = group.create_task(sequences(whole, 20))
            await asyncio.sleep(0.2)
            assert not reading.done()
            cluster.heal()
        assert reading.result() == list(range(1, 21))
        await writer.append("a", an_event(21))
        async with asyncio.timeout(30):
            assert await sequences(followed, 20) == list(range(2, 22))
        assert await bus.last_sequence(LOG, subjects.log("a")) == 21
        assert await bus.last_sequence(LOG, subjects.log("b")) == 0


async def cut_off_serving(cluster: Cluster, number: int, bus: NatsBus) -> None:
    """The server is cut off, and answers Direct Gets from its copy: not all at once after a start.

    `bus` is connected to it alone.
    """
    async with asyncio.timeout(30):
        while True:
            cluster.cut_off(number)
            try:
                await bus.get(LOG, 1)
            except TransientError:
                cluster.heal()
                await asyncio.sleep(1)
            else:
                return


async def sequences(events: AsyncGenerator[tuple[int, object], None], count: int) -> list[int]:
    return [(await anext(events))[0] for _ in range(count)]


async def test_a_leader_cut_off_takes_nothing_and_its_aggregator_is_fenced_off(
    cluster: Cluster, link: Link
) -> None:
    first = await link()
    await ensure_streams(first, 3)
    await wait_until(lambda: in_step(first, LOG), timeout_s=20)
    cut = await cluster.leader(first, LOG)
    there, here = await link(cut), await link(*(n for n in range(SERVERS) if n != cut))
    older = await LogWriter.open(there, LOG)
    await older.claim()
    await older.append("a", an_event(1))
    cluster.cut_off(cut)
    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        fenced = group.create_task(refused(older))
        newer = LogWriter(here, LOG, last=older.last)
        await newer.claim()
        await newer.append("a", an_event(3))
        with pytest.raises((TransientError, SequenceMismatch)):
            await there.append(subjects.log("a"), b"no", stream=LOG, expected_last=older.last)
        assert not fenced.done()
        cluster.heal()
    await wait_until(lambda: in_step(here, LOG), timeout_s=30)
    for bus in (here, there):
        whole = read_patiently(bus, LOG, subjects.log("a"), up_to=newer.last)
        async with aclosing(whole) as events:
            found = [event.round async for _, event in events if isinstance(event, JobEnded)]
        assert found == [1, 3]
    assert await patiently(lambda: here.last_sequence(LOG), "last_sequence") == newer.last


async def refused(writer: LogWriter) -> None:
    with pytest.raises(Fenced, match="another aggregator"):
        await writer.append("a", an_event(2))
