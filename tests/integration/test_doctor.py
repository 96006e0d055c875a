"""`seedwire doctor` against real brokers and services, whole and broken in each way."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from services.console import access
from services.console.addresses import free_port
from services.console.doctor import Examination, examine
from services.console.finding import Finding
from shared import subjects
from shared.broker import BrokerProcess, find_binary
from shared.codec import encode
from shared.identity import files
from shared.identity.access import TLS_NAME
from shared.identity.authority import Authority
from shared.jetstream_api import stream_config
from shared.log import STREAMS, ensure_streams
from shared.messages import StopJob
from shared.nats_bus import connect
from tests.support.fleet import a_fleet, a_spec, rows, write_rows
from tests.support.tiny_gguf import write
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services that are not there are not waited for."""
    monkeypatch.setattr("services.console.client.START_S", 0.2)


def of(check: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def problems(findings: list[Finding]) -> set[str]:
    return {finding.check for finding in findings if finding.state == "problem"}


async def test_without_a_broker_it_says_how_to_start_one() -> None:
    (found,) = of("broker", await examine(Examination(f"nats://127.0.0.1:{free_port()}")))
    assert (found.state, "connection refused" in found.text) == ("problem", True)
    assert "seedwire up" in found.mend


async def test_what_is_no_broker_is_told_from_one() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        (found,) = of("broker", await examine(Examination(f"nats://127.0.0.1:{port}")))
    assert (found.state, "no NATS server" in found.text) == ("problem", True)


async def test_an_old_broker_is_too_old() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.9.25","jetstream":true}\r\n')
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await examine(Examination(f"nats://127.0.0.1:{port}"))
    broker = of("broker", found)[0]
    assert broker.state == "problem"
    assert "nats-server 2.9.25" in broker.text
    assert "2.11 or newer" in broker.mend


@asynccontextmanager
async def plain_broker() -> AsyncGenerator[str]:
    """A nats-server without JetStream."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(str(find_binary()), "--addr", "127.0.0.1", "--port", str(port)),
        stderr=asyncio.subprocess.DEVNULL,
    )

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        await wait_until(listening)
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def test_a_broker_without_jetstream_is_a_problem_with_its_mend() -> None:
    async with plain_broker() as url:
        found = await examine(Examination(url))
    assert problems(found) == {"jetstream"}
    assert "`jetstream` block" in of("jetstream", found)[0].mend


async def test_missing_services_and_streams_are_named(broker: BrokerProcess) -> None:
    found = await examine(Examination(broker.url))
    assert of("broker", found)[0].state == of("link", found)[0].state == "ok"
    streams = {f"stream {spec.name}" for spec in STREAMS}
    assert problems(found) == {"aggregator", "scheduler"} | streams
    assert "the scheduler does not answer" in of("scheduler", found)[0].text


async def test_a_stream_with_other_settings_is_told_with_what_it_should_be(
    broker: BrokerProcess,
) -> None:
    bus = await connect([broker.url], name="test")
    try:
        await ensure_streams(bus)
        spec = next(spec for spec in STREAMS if spec.name == subjects.BLOBS_STREAM)
        changed = json.dumps(stream_config(spec) | {"max_msgs_per_subject": 7}).encode()
        await bus.ask(f"$JS.API.STREAM.UPDATE.{spec.name}", changed, timeout_s=5)
    finally:
        await bus.close()
    found = await examine(Examination(broker.url))
    assert problems(found) == {"stream BLOBS", "aggregator", "scheduler"}
    assert of("stream BLOBS", found)[0].text == "max_msgs_per_subject is 7, not 1"


async def test_a_fleet_that_works_is_well_and_its_models_and_rows_fit_its_jobs(
    tmp_path: Path,
) -> None:
    async with a_fleet(tmp_path, devices=2) as fleet:
        spec = a_spec(3)
        mistaken = replace(spec, task=replace(spec.task, labels={"cat": "apple", "dog": "iron"}))
        await fleet.submit(fleet.job("mistaken", mistaken))
        await wait_until(lambda: len(fleet.unable) == 2, timeout_s=20)
        ill = await examine(Examination(fleet.broker.url))
        (device,) = of("device d0", ill)
        assert (device.state, "job mistaken" in device.text) == ("warning", True)
        assert device.mend
        await fleet.bus.request(subjects.JOB_STOP, encode(StopJob(job="mistaken")), timeout_s=5)
        await fleet.submit(fleet.job("demo", a_spec(10_000)))
        await wait_until(lambda: bool(fleet.positions), timeout_s=20)
        data = write_rows(tmp_path / "data.jsonl", [*rows(10), {"text": "none", "label": "wood"}])
        stranger = tmp_path / "stranger.json"
        stranger.write_text('{"n_embd": 8}')

        async def examined(model: Path) -> list[Finding]:
            # The fake engine has a JSON file for a model; the rest is as it is for any.
            return await examine(
                Examination(fleet.broker.url, model, data, tmp_path, engine="fake")
            )

        found = await examined(fleet.model)
        assert problems(found) == set()
        assert "1 of 2 jobs are running" in of("aggregator", found)[0].text
        assert "2 of 2 devices" in of("scheduler", found)[0].text
        assert [one.text for one in of("model", found)][-1] == "is what job demo runs on"
        (rows_found,) = of("data", found)
        assert (rows_found.state, "10 usable rows for job demo, 1 refused" in rows_found.text) == (
            "warning",
            True,
        )
        assert "data.jsonl:11: its label is not one of" in rows_found.text
        (_, other) = of("model", await examined(stranger))
        assert (other.state, "model.json" in other.text) == ("warning", True)


async def test_a_model_that_cannot_be_tuned_and_rows_that_cannot_be_used_are_problems(
    tmp_path: Path,
) -> None:
    nobody = f"nats://127.0.0.1:{free_port()}"
    (tmp_path / "model.gguf").write_bytes(b"GGML not a model")
    (tmp_path / "data.jsonl").write_text('{"text": "no label"}\nnot JSON\n')
    found = await examine(
        Examination(nobody, tmp_path / "model.gguf", tmp_path / "data.jsonl", tmp_path)
    )
    (model,), (data,) = of("model", found), of("data", found)
    assert (model.state, data.state) == ("problem", "problem")
    assert ("not a GGUF file" in model.text, "convert" in model.mend) == (True, True)
    assert "no usable row" in data.text


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("qwen3", False)])
async def test_a_real_model_is_told_with_what_it_cannot_do(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", architecture, tied=tied)
    found = of("model", await examine(Examination(f"nats://127.0.0.1:{free_port()}", path)))
    assert found[0].text.startswith(f"tiny.gguf: {architecture}, ")
    assert [one.state for one in found] == (["ok", "warning"] if tied else ["ok"])
    assert "--adapter lora" in found[-1].mend or not tied


async def test_an_architecture_that_nobody_knows_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "perceptron")
    (found,) = of("model", await examine(Examination(f"nats://127.0.0.1:{free_port()}", path)))
    assert found.state == "problem", found
    assert "perceptron" in found.text, found


async def test_a_secured_broker_is_told_apart_and_wants_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.console.client.CONNECT_S", 1.0)
    authority = Authority(tmp_path / "identity")
    await asyncio.to_thread(authority.make, hosts=["127.0.0.1"])
    broker = BrokerProcess(tmp_path / "broker", security=files.read(authority.server_conf))
    await broker.start()
    try:
        refused = of("broker", await examine(Examination(broker.url)))
        assert "it wants credentials and TLS" in refused[0].text
        assert [one.state for one in refused] == ["ok", "problem"]
        assert "--creds" in refused[1].mend
        monkeypatch.setattr(access.given, "creds", str(authority.creds("console")))
        monkeypatch.setattr(access.given, "ca", str(authority.ca_file))
        monkeypatch.setattr(access.given, "tls_name", TLS_NAME)
        found = await examine(Examination(broker.url))
        assert of("link", found)[0].state == "ok"
        assert of("registrar", found)[0].state == "warning"
        assert of("stream LOG", found)[0].text == "is missing"
    finally:
        await broker.stop()
