"""The whole path with the fake engine: real processes, a real broker, real kills."""

import asyncio
import sys
from pathlib import Path

from msgspec.structs import replace

from deploy.demo.processes import ROOT
from deploy.demo.witness import examine
from shared.messages import AdapterEvaluated, JobEnded, RoundClosed
from tests.support.fleet import Fleet, a_fleet, a_spec
from tests.support.waiting import wait_until


async def ends_alike(fleet: Fleet, job: str, digest: str) -> None:
    """Every device says that it stands at `digest`."""

    def alike() -> bool:
        assert fleet.hearing is not None
        if fleet.hearing.done():
            fleet.hearing.result()  # what ended it is what failed
        ends = {fleet.positions.get(f"{job}/{name}", "").split(":")[-1] for name in fleet.devices}
        return ends == {digest}

    await wait_until(alike, timeout_s=20, what=f"all at {digest[:12]}: {fleet.positions}")


async def test_a_fleet_learns_and_everyone_ends_at_one_digest(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=3) as fleet:
        # Every round wants all three: whoever takes no part in a job holds no adapter of it.
        await fleet.submit(fleet.job("one", a_spec(12, enough_devices=3)))
        await fleet.submit(fleet.job("two", a_spec(6, how="probe", enough_devices=3)))
        one, two = await asyncio.gather(fleet.events_until("one"), fleet.events_until("two"))
        for events, rounds in ((one, 12), (two, 6)):
            closes = [e for e in events if isinstance(e, RoundClosed) and e.commit]
            assert len(closes) == rounds
            evaluated = [e for e in events if isinstance(e, AdapterEvaluated)]
            evaluated.sort(key=lambda event: event.round)
            assert evaluated[-1].loss < evaluated[0].loss
            end = events[-1]
            assert isinstance(end, JobEnded)
            await ends_alike(fleet, end.job, end.digest)
        verdict = await examine(fleet.broker.url, "one", fleet.ledgers())
        assert verdict.clean, verdict
        assert verdict.final_digest == one[-1].digest  # pyright: ignore[reportAttributeAccessIssue]


async def test_kills_of_everything_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=3) as fleet:
        await fleet.submit(fleet.job("demo", a_spec(40, deadline_s=2.0)))
        victims = [
            fleet.services["aggregator"],
            fleet.devices["d1"],
            fleet.services["scheduler"],
            fleet.devices["d2"],
            fleet.services["aggregator"],
        ]
        for at, victim in zip((3, 8, 13, 18, 23), victims, strict=True):
            await fleet.events_until(
                "demo", lambda event, at=at: isinstance(event, RoundClosed) and event.round >= at
            )
            await victim.kill()
            await victim.start()
        events = await fleet.events_until("demo")
        end = events[-1]
        assert isinstance(end, JobEnded)
        assert sum(isinstance(e, RoundClosed) and e.commit is not None for e in events) == 40
        await ends_alike(fleet, "demo", end.digest)
        verdict = await examine(fleet.broker.url, "demo", fleet.ledgers())
        assert verdict.clean, verdict
        assert verdict.measured >= 80


async def test_a_job_that_nobody_can_serve_keeps_no_device_from_the_next(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=2) as fleet:
        spec = a_spec(3)
        mistaken = replace(spec, task=replace(spec.task, labels={"cat": "apple", "dog": "iron"}))
        await fleet.submit(fleet.job("mistaken", mistaken))
        await wait_until(lambda: len(fleet.unable) == 2, timeout_s=20)
        assert "this job's" in fleet.unable["mistaken/d0"]
        await fleet.submit(fleet.job("right", spec))
        async with asyncio.timeout(20):
            events = await fleet.events_until("right")
        assert isinstance(events[-1], JobEnded)


async def test_an_outsider_with_nats_and_msgpack_alone_sees_rounds_close(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=2) as fleet:
        outsider = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "deploy" / "demo" / "outsider.py"),
            fleet.broker.url,
            stdout=asyncio.subprocess.PIPE,
        )
        assert outsider.stdout is not None
        assert await outsider.stdout.readline() == b"watching\n"
        await fleet.submit(fleet.job("demo", a_spec(4)))
        await fleet.events_until("demo")
        out, _ = await outsider.communicate()
        lines = [line.split()[:3] for line in out.decode().splitlines()]
        assert lines == [
            *(["demo", str(number), "enough"] for number in range(1, 5)),
            ["demo", "5", "evaluated"],
        ]
