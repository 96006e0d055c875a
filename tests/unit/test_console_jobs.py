"""The console over a broker in memory, its child processes, and its command line."""

import asyncio
import io
import json
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from msgspec.structs import replace
from rich.console import Console
from typer.testing import CliRunner

from services.console import listing
from services.console.__main__ import app
from services.console.addresses import EVERYWHERE, HOST, check_free, free_port
from services.console.children import Program, Supervisor
from services.console.client import Unanswered, ask, shown
from services.console.failure import EXIT_UNREACHABLE, EXIT_USAGE, Failure
from services.console.printing import Printer
from services.console.progress import Progress
from services.console.spec import wanted
from services.console.state_lock import locked
from services.console.submit import Submission, submit
from services.console.transfer import download, upload
from services.console.up import Plan, Ports
from services.console.watch import watch
from shared import subjects
from shared.blobs import CHUNK_BYTES
from shared.broker import BrokerProcess
from shared.bus import Bus
from shared.codec import decode, decode_manifest, encode
from shared.errors import ConfigError
from shared.identity.access import Access
from shared.jetstream_api import NoResponders
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import (
    AdapterEvaluated,
    Commit,
    DevicesListed,
    DeviceSummary,
    JobAccepted,
    JobEnded,
    JobOpened,
    JobsListed,
    JobSummary,
    ListDevices,
    ListJobs,
    LogEvent,
    Message,
    Refused,
    RoundClosed,
    RoundOpened,
    StopJob,
    SubmitJob,
)
from shared.messages.jobs import Loss
from shared.runtime import EXIT_CONFIG, Stop
from tests.support.facts import DIGEST, round_closed, round_opened
from tests.support.jobs import a_job
from tests.support.waiting import wait_until

Reason = Literal["enough", "evaluated"]


def a_life(job: str = "demo", *, loss: Loss = "choices") -> list[LogEvent]:
    """A short job, from its first fact to its last."""
    spec = a_job(rounds=2).spec
    return [
        JobOpened(job=job, spec=replace(spec, task=replace(spec.task, loss=loss))),
        evaluated(1, correct=25),
        closed(1, loss=1.5),
        closed(2, loss=0.5),
        opened_last(3),
        evaluated(3, correct=75),
        closed(3, reason="evaluated"),
        JobEnded(job=job, epoch=0, round=3, reason="finished", digest=DIGEST),
    ]


def closed(round: int, *, loss: float | None = None, reason: Reason = "enough") -> RoundClosed:
    if reason == "enough":
        return round_closed(round, commit=Commit(0, []), updates=4, devices=2, loss=loss)
    return round_closed(round, reason=reason, updates=0, devices=0, loss=loss)


def opened_last(round: int) -> RoundOpened:
    """The evaluation at a job's end."""
    return round_opened(
        round, kind="evaluate", directions=0, evaluate=True, enough_devices=1, enough_probes=0
    )


def evaluated(round: int, *, correct: int) -> AdapterEvaluated:
    return AdapterEvaluated(
        job="demo",
        epoch=0,
        round=round,
        digest=DIGEST,
        examples=100,
        correct=correct,
        weight=100,
        loss=120.0,
        detail_sequence=round,
    )


class Services:
    """Answers as aggregator and scheduler would; keeps what it was asked."""

    def __init__(self, *answers: Message) -> None:
        self.answers = list(answers)
        self.asked: list[Message] = []

    async def serve(self, bus: Bus) -> None:
        async with bus.subscribe(f"{subjects.PREFIX}.>") as deliveries:
            async for delivery in deliveries:
                if delivery.reply:
                    self.asked.append(decode(delivery.data, Message))
                    await bus.publish(delivery.reply, encode(self.answers.pop(0)))


@asynccontextmanager
async def a_fleet(*answers: Message) -> AsyncGenerator[tuple[MemoryBus, LogWriter, Services], None]:
    """The console's bus, the log's writer, and services that give `answers` in their order."""
    broker = MemoryBroker()
    bus = broker.connect("console")
    await ensure_streams(bus)
    services = Services(*answers)
    serving = asyncio.create_task(services.serve(broker.connect("services")))
    await asyncio.sleep(0)
    try:
        yield bus, await LogWriter.open(bus, subjects.LOG_STREAM), services
    finally:
        serving.cancel()
        await asyncio.wait({serving})


def paper(*, terminal: bool = False) -> tuple[Printer, io.StringIO]:
    """A printer whose reader gets a string."""
    written = io.StringIO()
    console = Console(file=written, width=120, force_terminal=terminal)
    return Printer(as_json=False, out=console), written


async def test_a_job_that_is_over_is_shown_to_its_end() -> None:
    async with a_fleet() as (bus, log, _):
        for event in a_life():
            await log.append("demo", event)
        printer, written = paper()
        await watch(bus, "demo", printer)
        for line in (
            "demo round 1: loss 1.5000, accuracy 25.0%, held-out loss 1.2000, 2 devices (enough)\n",
            "demo round 2: loss 0.5000, 2 devices (enough)\n",  # no figures that are not new
            "demo final evaluation: accuracy 75.0%, held-out loss 1.2000\n",
            "25.0% -> 75.0%",
        ):
            assert line in written.getvalue()
        assert (
            "1.5000 -> 0.5000" not in written.getvalue()
        )  # batches differ; held-out loss does not


def test_without_held_out_rows_the_devices_loss_is_all_there_is_to_say() -> None:
    progress = Progress("demo")
    for event in a_life():
        if not isinstance(event, AdapterEvaluated):
            progress.evolve(event)
    assert progress.close_line() == "final evaluation: none came"
    assert ("devices' loss", "1.5000 -> 0.5000") in progress.summary()


async def test_a_task_without_right_answers_has_no_accuracy() -> None:
    there = JobSummary("demo", "ended", 0, 3, 2, DIGEST, reason="finished", accuracy=0.75)
    async with a_fleet(JobsListed(jobs=[there])) as (bus, log, _):
        for event in a_life(loss="tokens"):
            await log.append("demo", event)
        printer, written = paper()
        await watch(bus, "demo", printer)
        assert "accuracy" not in written.getvalue()
        printer.people.print(listing.jobs_table(await listing.jobs(bus)))
        assert "75.0%" not in written.getvalue()


async def test_while_no_device_takes_part_it_says_why_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.console.watch.QUIET_S", 0.01)
    idle = DeviceSummary("a", 1.0, doing="probe round 1 part 0")
    without = DeviceSummary("b", 1.0, problem="no model [q8]; set --models")
    answers = [DevicesListed(devices=[without])] * 3 + [
        DevicesListed(devices=[idle, without])
    ] * 999
    async with a_fleet(*answers) as (bus, log, services):
        life = a_life()
        await log.append("demo", life[0])
        printer, written = paper()
        watching = asyncio.create_task(watch(bus, "demo", printer))
        await wait_until(lambda: len(services.asked) > 6)
        for event in life[1:]:
            await log.append("demo", event)
        await watching
        told = [line for line in written.getvalue().splitlines() if "no device has sent" in line]
        reason = (
            "e.g. b: no model [q8]; set --models; see `seedwire devices`; `seedwire job stop demo`"
            " ends the job"
        )
        assert told == [
            f"no device has sent anything yet: 1 known, 0 at work, 1 with a problem, {reason}",
            f"no device has sent anything yet: 2 known, 1 at work, 1 with a problem, {reason}",
        ]


async def test_a_running_job_is_followed_until_it_ends() -> None:
    async with a_fleet() as (bus, log, _):
        life = a_life()
        await log.append("demo", life[0])
        printer, written = paper(terminal=True)
        watching = asyncio.create_task(watch(bus, "demo", printer))
        for event in life[1:]:
            await asyncio.sleep(0)
            assert not watching.done()
            await log.append("demo", event)
        progress = await watching
        assert (progress.closed, progress.updates) == (2, 8)
        assert "2/2" in written.getvalue()


async def test_json_lines_hold_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    async with a_fleet() as (bus, log, _):
        for event in a_life():
            await log.append("demo", event)
        await watch(bus, "demo", Printer(as_json=True))
        printed = capsys.readouterr()
        types = [json.loads(line)["type"] for line in printed.out.splitlines()]
        assert types == [type(event).__name__ for event in a_life()]
        assert printed.err == ""


async def test_watching_a_job_there_is_not_names_those_there_are() -> None:
    there = JobSummary("other", "running", 0, 1, 9, DIGEST)
    async with a_fleet(JobsListed(jobs=[there])) as (bus, _, _):
        with pytest.raises(Failure, match="no job is called demo; jobs: other"):
            await watch(bus, "demo", paper()[0])


async def test_jobs_and_devices_are_listed_as_the_services_know_them() -> None:
    job = JobSummary("demo", "ended", 0, 3, 2, DIGEST, reason="finished", accuracy=0.75)
    phone = DeviceSummary("phone", 12.0, rows=40, problem="no model; set --models")
    listed = DevicesListed(devices=[phone, DeviceSummary("tablet", 7300.0)])
    async with a_fleet(JobsListed(jobs=[job]), listed) as (bus, log, _):
        await log.append("demo", a_life()[0])
        printer, written = paper()
        printer.people.print(listing.jobs_table(await listing.jobs(bus)))
        printer.people.print(listing.devices_table(await listing.devices(bus)))
        for expected in ("ended (finished)", "75.0%", "phone", "12 s ago", "2 h ago, away"):
            assert expected in written.getvalue()


async def test_a_refusal_and_silence_are_failures_with_their_reason() -> None:
    async with a_fleet(Refused(reason="demo is over"), JobsListed(jobs=[])) as (bus, _, _):
        for reason in ("demo is over", "a JobsListed for an answer to StopJob"):
            with pytest.raises(Failure, match=reason):
                await ask(bus, subjects.JOB_STOP, StopJob(job="demo"), JobAccepted)
    with pytest.raises(Unanswered, match="the aggregator does not answer"):
        await ask(MemoryBroker().connect("alone"), subjects.JOB_STOP, StopJob(job="x"), JobAccepted)


class Starting(MemoryBus):
    """Nobody serves the first `failures` requests."""

    failures = 0

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        if self.failures:
            self.failures -= 1
            raise NoResponders(f"nobody serves {subject}")
        return encode(JobsListed(jobs=[]))


async def test_a_service_that_is_starting_is_waited_for_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = Starting(MemoryBroker(), "console")
    bus.failures = 2
    assert await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed) == JobsListed(jobs=[])
    monkeypatch.setattr("services.console.client.START_S", 0.1)
    bus.failures = 99
    with pytest.raises(Unanswered, match="the scheduler does not answer"):
        await ask(bus, subjects.DEVICE_LIST, ListDevices(), DevicesListed)


async def test_a_file_comes_back_by_its_digest_alone(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    async with a_fleet() as (bus, _, _):
        for size in (0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5):
            source.write_bytes(b"s" * size)
            ref = await upload(bus, source, paper()[0].people)
            if size:  # of an empty file the store knows nothing
                assert await download(bus, ref.digest, copy, paper()[0].people) == ref
                assert copy.read_bytes() == source.read_bytes()
        with pytest.raises(Failure, match=f"no file {DIGEST}"):
            await download(bus, DIGEST, copy, paper()[0].people)


async def test_a_submitted_job_brings_its_model_and_a_manifest_of_it(tmp_path: Path) -> None:
    model = tmp_path / "model.json"
    model.write_text(json.dumps({"n_embd": 16, "n_vocab": 512}))
    flags = {"task": {"labels": {"a": "apple", "b": "banana", "c": "cherry"}}}
    asked, rows = wanted(flags, {}), wanted(flags, {}, last_block=False)
    submission = Submission("demo", model, asked, lambda _: rows, engine="fake")
    async with a_fleet(JobsListed(jobs=[]), JobAccepted(job="demo")) as (bus, _, services):
        printer, written = paper()
        await submit(bus, submission, printer)
        _, request = services.asked
        assert isinstance(request, SubmitJob)
        made = decode_manifest(request.manifest)
        assert (made.d, made.architecture) == (3 * 16, "fake")
        assert request.spec == rows.spec  # the fake model has no last block
        stored = await bus.get_last(
            subjects.BLOBS_STREAM, subjects.blob(made.variants[0].digest, 0)
        )
        assert stored is not None
        assert stored.data == model.read_bytes()
        assert "b as ' banana' (token" in written.getvalue()
        assert "job demo accepted" in written.getvalue()


def test_the_address_shown_keeps_the_password_to_itself() -> None:
    assert shown("nats://me:secret@host:4222") == "nats://host:4222"


# ---- seedwire up


async def test_a_service_that_dies_is_started_again_until_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying_child.py").write_text("print('hello', flush=True); raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stop, said = Stop(), list[str]()
    supervisor = Supervisor(tmp_path / "logs", stop, said.append)
    keeping = asyncio.create_task(supervisor.keep(Program("child", "dying_child", [])))
    await wait_until(lambda: len(said) >= 2)
    stop.set()
    await keeping
    assert "ended with code 3" in said[0]
    assert (tmp_path / "logs" / "child.log").read_text().startswith("hello\nhello\n")


async def test_a_service_with_a_wrong_configuration_ends_it_all_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import sys; print('error: no such thing', file=sys.stderr); print('x'); sys.exit(78)"
    (tmp_path / "wrong_child.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    supervisor = Supervisor(tmp_path, Stop(), print)
    with pytest.raises(ConfigError, match="child: no such thing"):
        await supervisor.keep(Program("child", "wrong_child", []))


async def test_a_child_is_asked_to_drain_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import signal, sys, time
def drain(*_):
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("ready", flush=True)
time.sleep(60)
"""
    (tmp_path / "draining_child.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stop = Stop()
    supervisor = Supervisor(tmp_path, stop, print)
    keeping = asyncio.create_task(supervisor.keep(Program("child", "draining_child", [])))
    log = tmp_path / "child.log"
    await wait_until(lambda: log.exists() and "ready" in log.read_text())
    stop.set()
    await keeping
    assert "drained" in log.read_text()


def test_the_first_device_alone_is_trusted_with_the_held_out_rows(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    plan = Plan(tmp_path, devices={"a": data, "b": data}, heldout=data, models=(tmp_path,))
    plan.check()
    fleet = Access(["nats://x"])
    services = plan.services(fleet, None, Ports(telemetry=9, serve=None))
    assert [program.name for program in services] == ["aggregator", "scheduler", "telemetry"]
    trusted = ["--trusted" in plan.device(name, fleet, "").arguments for name in plan.devices]
    assert trusted == [True, False]
    for wrong in (
        Plan(tmp_path, heldout=data),
        Plan(tmp_path, devices={"a b": data}),
        Plan(tmp_path, devices={"a": tmp_path / "none"}),
    ):
        with pytest.raises(ConfigError):
            wrong.check()


async def test_a_state_directory_has_one_user_and_what_a_killed_one_left_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.console.state_lock.LEFT_BEHIND_S", 1.0)
    said = list[str]()
    async with locked(tmp_path / "state", said.append) as held:
        left_behind = os.dup(held)
        with pytest.raises(ConfigError, match="is in use by another"):
            async with locked(tmp_path / "state", said.append):
                pass
    assert not said
    with pytest.raises(ConfigError, match="what an earlier"):
        async with locked(tmp_path / "state", said.append):
            pass
    asyncio.get_running_loop().call_later(0.2, os.close, left_behind)
    async with locked(tmp_path / "state", said.append):
        assert ["waiting for" in line for line in said] == [True, True]


def test_a_port_in_use_is_named_with_the_option_that_mends_it() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        for host in (HOST, EVERYWHERE, "localhost"):
            with pytest.raises(ConfigError, match=rf"port {port} is in use .* --port$"):
                check_free(host, port, "--port")
    check_free(HOST, port, "--port")
    check_free(HOST, 0, "--port")
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        check_free("192.0.2.1", port, "--port")


async def test_a_broker_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        broker = BrokerProcess(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(
            ConfigError, match=r"did not start on .*: \[FTL\] .*already in use"
        ) as e:
            await broker.start()
    assert "\n" not in str(e.value)


# ---- the command line


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("job list --servers nats://127.0.0.1:{port}", EXIT_UNREACHABLE, "seedwire up"),
        ("job submit --name x", EXIT_USAGE, "--model"),
        ("job submit --name x --model none.gguf", EXIT_USAGE, "no such file"),
        ("job submit --name a.b --model {model}", EXIT_USAGE, "A-Z"),
        ("job submit --name x --model {model} --labels a=1,a=2", EXIT_USAGE, "twice"),
        ("job submit --name x --model {model} --labels World", EXIT_USAGE, "name at least two"),
        ("job submit --name x --model {model} --spec none.toml", EXIT_CONFIG, "none.toml"),
        ("job submit --name x --model {model} --eps=-1", EXIT_USAGE, "--eps"),
        ("up --device broken", EXIT_USAGE, "NAME=DATA"),
    ],
)
def test_what_the_user_can_mend_is_a_sentence_and_a_code(
    line: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.console.client.CONNECT_S", 0.5)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    arguments = [part.format(model=model, port=free_port()) for part in line.split()]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert "Traceback" not in result.output
