"""A site's own nats-server between its devices and the hub, by the files in deploy/nats."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

from deploy.demo.processes import ROOT
from shared.broker import start_broker
from shared.log import follow_detail
from shared.messages import RoundClosed, UpdatesFolded
from tests.deploy.containers import free_port
from tests.support.cluster import start_gate
from tests.support.fleet import Fleet, a_spec, fleet_on
from tests.support.sites import ends_whole

NATS = ROOT / "deploy" / "nats"
ROUNDS = 100


def written(folder: Path, changes: Mapping[str, str]) -> Path:
    """deploy/nats with the addresses and the store of this test."""
    folder.mkdir()
    for name in ("nats-server.conf", "hub.conf", "leaf.conf"):
        text = (NATS / name).read_text(encoding="utf-8")
        for there, here in changes.items():
            text = text.replace(there, here)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


async def counted(fleet: Fleet, device: str, after: int) -> int:
    """The first round beyond `after` that an update of `device` was measured for and counted in."""
    async with aclosing(follow_detail(fleet.bus, fleet.bus)) as details:
        async for _, event in details:
            for row in event.updates if isinstance(event, UpdatesFolded) else ():
                if row.device == device and row.round > after:
                    return row.round
    raise AssertionError("the bus was closed")


async def closes_alone(fleet: Fleet, after: int) -> int:
    """The first round beyond `after` that closed with one device."""
    events = await fleet.events_until(
        "demo",
        lambda event: isinstance(event, RoundClosed) and event.round > after and event.devices == 1,
    )
    assert isinstance(events[-1], RoundClosed)
    return events[-1].round


async def test_devices_behind_a_leaf_go_on_when_its_link_is_back(tmp_path: Path) -> None:
    """While it is cut, rounds close without them at their deadline; what they measured is kept."""
    hub_port = free_port()
    async with start_gate(hub_port) as link:
        changes = {
            "nats://hub.example:7422": f"nats://127.0.0.1:{link.port}",
            # A hub tells leaves of ways to it: here of no other than the link that is cut.
            '"0.0.0.0:7422"': f'"127.0.0.1:{hub_port}"\n  advertise: "127.0.0.1:{link.port}"',
            "0.0.0.0:8222": f"127.0.0.1:{free_port()}",
            "0.0.0.0:4222": "127.0.0.1:-1",
            '"/data"': f'"{tmp_path / "store"}"',
        }
        written(tmp_path / "conf", changes)
        hub_conf, leaf_conf = (f'include "../conf/{name}.conf"\n' for name in ("hub", "leaf"))
        async with (
            start_broker(tmp_path / "hub", security=hub_conf) as hub,
            start_broker(tmp_path / "site", security=f"jetstream: false\n{leaf_conf}") as leaf,
            fleet_on(hub, tmp_path) as fleet,
        ):
            await fleet.start_device("d0", trusted=True)
            await fleet.start_device("d1", url=leaf.url)
            await fleet.submit(fleet.job("demo", a_spec(ROUNDS, deadline_s=1.5)))
            async with asyncio.timeout(30):
                joined = await counted(fleet, "d1", 0)
            link.shut()
            async with asyncio.timeout(30):
                alone = await closes_alone(fleet, await closes_alone(fleet, joined))
            assert fleet.devices["d1"].running
            link.open()
            async with asyncio.timeout(20):
                await counted(fleet, "d1", alone + 1)
            await ends_whole(fleet, "demo", ROUNDS)
