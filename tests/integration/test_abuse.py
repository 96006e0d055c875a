"""Devices that mean ill, with keys of their own, beside honest ones at a real job."""

import asyncio
import ssl
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client

from deploy.demo.processes import ROOT, Child
from deploy.demo.witness import examine
from shared import subjects
from shared.codec import encode
from shared.identity.access import TLS_NAME
from shared.messages import (
    DeviceReport,
    Enroll,
    Evaluation,
    JobEnded,
    JobSpec,
    Pacing,
    RequestWork,
    RoundClosed,
    SubmitUpdate,
    Tuning,
)
from tests.chaos.abuse import poison
from tests.support.fleet import Fleet, a_task, rows, write_rows
from tests.support.secured import Secured, secured

EVIL, HONEST = "evil", ("d0", "d1", "d2")
EACH = 40
FLOOD_RATE = 2000
"""Messages a second of one device; an honest one sends some ten a round."""
FLOODING_AFTER_S = 3.0
FLOODED_S = 2.0
"""What a round may take at the median while one device floods."""


@asynccontextmanager
async def a_secured_fleet(folder: Path) -> AsyncGenerator[tuple[Secured, Fleet], None]:
    """All services and the honest devices, each with its key."""
    async with secured(folder) as keys:
        await keys.start_registrar()
        bus = await keys.connect(keys.authority.creds("console"))
        model = folder / "model.json"
        model.write_text("{}")
        fleet = Fleet(folder, keys.broker, bus, model)
        ca = ["--ca-file", str(keys.authority.ca_file), "--tls-name", TLS_NAME]
        try:
            for name in ("aggregator", "scheduler", "telemetry"):
                more = ["--port", "0"] if name == "telemetry" else []
                creds = str(keys.authority.creds(name))
                await fleet.start_service(name, "--creds-file", creds, *ca, *more)
            for number, name in enumerate(HONEST):
                fleet.devices[name] = await _device(keys, fleet, name, number, ca)
            yield keys, fleet
        finally:
            for child in [*fleet.devices.values(), *fleet.services.values()]:
                await child.stop()
            await bus.close()


async def _device(keys: Secured, fleet: Fleet, name: str, number: int, ca: list[str]) -> Child:
    folder = fleet.folder
    data = write_rows(folder / f"{name}.jsonl", rows(40, offset=40 * number))
    arguments = ["--device", name, "--servers", fleet.broker.url, "--engine", "fake", *ca]
    arguments += ["--creds-file", str(keys.device_creds(name)), "--data", str(data)]
    arguments += ["--state-dir", str(folder / "state" / name), "--models", str(fleet.model)]
    if not number:
        heldout = write_rows(folder / "heldout.jsonl", rows(60, offset=100_000))
        arguments += ["--heldout", str(heldout), "--trusted", "true"]
    child = Child(name, "edge_client", arguments, folder / f"{name}.log")
    await child.start()
    return child


def a_spec(rounds: int) -> JobSpec:
    return JobSpec(
        task=a_task(),
        tuning=Tuning(how="exact", rounds=rounds, directions=64, batch_rows=1000, step=0.3),
        pacing=Pacing(enough_devices=2, enough_probes=128, deadline_s=20.0),
        evaluation=Evaluation(every_rounds=5),
        snapshot_every=10,
    )


async def _client(keys: Secured, creds: str | None, inbox: str) -> Client:
    client = Client()

    async def said(_error: Exception) -> None:
        """What it may not do, the broker has told it."""

    await client.connect(
        keys.broker.url,
        error_cb=said,
        tls=ssl.create_default_context(cafile=str(keys.authority.ca_file)),
        tls_hostname=TLS_NAME,
        user_credentials=creds,
        inbox_prefix=inbox,
    )
    return client


def _drawn(strategy: st.SearchStrategy[bytes], count: int) -> list[bytes]:
    """`count` examples, the same every time."""
    found: list[bytes] = []

    @given(strategy)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    def collect(data: bytes) -> None:
        found.append(data)

    collect()
    return found


def _poisoned() -> list[bytes]:
    """Messages of every kind, whole, spoiled and mangled; most of those that devices send."""
    found: list[bytes] = [b"", b"\xc1", b"\x91" * 200_000, b"\xdd\xff\xff\xff\xff", b"x" * 900_000]
    for kind in poison.KINDS:
        count = EACH if kind in (DeviceReport, RequestWork, SubmitUpdate) else 4
        found += _drawn(poison.messages(kind).map(poison.pack), count)
        found += _drawn(poison.spoiled(kind).map(poison.pack), count)
        found += _drawn(poison.mangled(kind), count)
    return found


async def _attack(client: Client, own: list[str], messages: list[bytes], replies: list[str]) -> int:
    """Say everything on every subject, with every place to answer to; how much that was."""
    count = 0
    keys = ["", "demo.0.1.d0.0", "x" * 500, "a.b", "\u202e", "demo.0.1.evil.0"]
    for data in messages:
        for subject in own:
            headers = {subjects.KEY_HEADER: key} if (key := keys[count % len(keys)]) else None
            reply = replies[count % len(replies)]
            await client.publish(subject, data, reply=reply, headers=headers)
            count += 1
        await client.flush(30)
    return count


async def test_a_job_ends_clean_beside_a_device_and_a_stranger_that_say_all_they_can(
    tmp_path: Path,
) -> None:
    async with a_secured_fleet(tmp_path) as (keys, fleet):
        await fleet.submit(fleet.job("demo", a_spec(40)))
        messages = _poisoned()
        evil = await _client(keys, str(keys.device_creds(EVIL)), f"_INBOX_{EVIL}")
        stranger = await _client(keys, None, "_INBOX_joiner")
        elsewhere = [subjects.log("demo"), subjects.detail("demo"), subjects.settled("d0")]
        elsewhere += ["$JS.API.STREAM.PURGE.LOG", "$JS.API.STREAM.DELETE.LOG", ""]
        own = [subjects.work(EVIL), subjects.report(EVIL), subjects.update("demo", EVIL)]
        said = await _attack(evil, own, messages, elsewhere)
        others = [subjects.work("d1"), subjects.update("demo", "d1"), subjects.settled("d1")]
        said += await _attack(evil, others, messages[-20:], [""])
        said += await _attack(evil, ["$JS.API.DIRECT.GET.LOG"], messages, [f"_INBOX_{EVIL}.a.1"])
        knocks = [encode(Enroll(device="x", public_key="U" + "A" * 55, secret="a" * 22))]
        knocks += [data for data in messages if len(data) < 3000]
        said += await _attack(stranger, [subjects.ENROLL], knocks, elsewhere)
        async with asyncio.timeout(90):
            events = await fleet.events_until("demo")
        await evil.close()
        await stranger.close()
        assert said > 2000
        assert isinstance(events[-1], JobEnded)
        assert events[-1].reason == "finished"
        services = [*fleet.services.values(), *([keys.registrar] if keys.registrar else [])]
        assert [child.name for child in services if not child.running] == []
        login = {
            "user_credentials": str(keys.authority.creds("console")),
            "inbox_prefix": "_INBOX_console",
            "tls": ssl.create_default_context(cafile=str(keys.authority.ca_file)),
            "tls_hostname": TLS_NAME,
        }
        verdict = await examine(fleet.broker.url, "demo", fleet.ledgers(), **login)
        assert not verdict.lost, verdict
        assert not verdict.wrong_rounds or EVIL in str(events), verdict
        assert "message_failed" not in fleet.logs()


async def test_one_device_that_floods_slows_no_round_beyond_its_bound(tmp_path: Path) -> None:
    async with a_secured_fleet(tmp_path) as (keys, fleet):
        quiet = await _rounds_s(fleet, "quiet", 20)
        flood = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.abuse.flood", fleet.broker.url, EVIL),
            *(str(keys.device_creds(EVIL)), str(keys.authority.ca_file), str(FLOOD_RATE)),
            cwd=ROOT,
        )
        try:
            await asyncio.sleep(FLOODING_AFTER_S)
            flooded = await _rounds_s(fleet, "flooded", 20)
        finally:
            flood.kill()
            await flood.wait()
        assert len(quiet) == len(flooded) == 20
        assert statistics.median(flooded) < FLOODED_S
        assert all(child.running for child in fleet.services.values())


async def _rounds_s(fleet: Fleet, job: str, rounds: int) -> list[float]:
    """What each round of a job took."""
    await fleet.submit(fleet.job(job, a_spec(rounds)))
    ends: list[float] = []
    async with asyncio.timeout(120):
        await fleet.events_until(
            job,
            lambda event: (
                isinstance(event, JobEnded)
                or (isinstance(event, RoundClosed) and ends.append(time.monotonic()) is not None)
            ),
        )
    return [after - before for before, after in pairwise(ends)]
