"""The real daemon, its engine fake, its broker real; tests play scheduler and aggregator."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgpack
import numpy as np
import pytest

from shared import blobs, subjects
from shared.adapter import Adapter, term
from shared.bus import Link
from shared.codec import decode, encode, encode_manifest
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.messages import (
    Block,
    ComeBack,
    Commit,
    DeviceReport,
    EpochOpened,
    EvaluateResult,
    EvaluateWork,
    JobEnded,
    JobOpened,
    JobSpec,
    Manifest,
    Message,
    ModelPublished,
    ProbeResult,
    ProbeWork,
    RequestWork,
    RoundClosed,
    SubmitUpdate,
    Task,
    UpdateKey,
    UpdateSettled,
    Variant,
    WakeUp,
    WorkAssigned,
)
from shared.nats_bus import connect
from tests.support.broker import BrokerProcess
from tests.support.proxy import start_proxy
from tests.support.waiting import wait_until

DEVICE = "dev-1"
WIDTH = 32
FAR = ComeBack(after_s=3600.0, reason="nothing to do")


class Fleet:
    """Scheduler and aggregator of one device, by hand: answers what `answers` holds, else FAR."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.requests: list[RequestWork] = []
        self.reports: list[DeviceReport] = []
        self.updates: list[SubmitUpdate] = []
        self.keys: list[str] = []
        self.answers: list[Message | bytes] = []
        self.adapters: dict[str, Adapter] = {}
        self.writer: LogWriter | None = None

    @property
    def report(self) -> DeviceReport:
        return self.reports[-1]

    @property
    def declined(self) -> str:
        return self.requests[-1].declined if self.requests else ""

    def count(self, name: str) -> int:
        return self.report.counters.get(name, 0) if self.reports else 0

    async def append(self, job: str, *events: Message) -> None:
        if self.writer is None:
            self.writer = await LogWriter.open(self.link, subjects.LOG_STREAM)
        for event in events:
            await self.writer.append(job, event)  # type: ignore[arg-type]

    async def open_job(self, job: str, model: Path, *, url: str | None = None) -> None:
        ref = blobs.reference(model)
        manifest = encode_manifest(
            Manifest(
                epoch=0,
                architecture="fake",
                seed=7,
                blocks=[Block("control", "l_out-0", [WIDTH], layer=0)],
                variants=[Variant(ref.digest, ref.size_bytes, model.name, url)],
                d=WIDTH,
            )
        )
        adapter = self.adapters[job] = Adapter(manifest)
        task = Task("choices", "{text} is", {"up": "alpha", "down": "beta"})
        await self.append(
            job,
            JobOpened(job=job, spec=JobSpec(task)),
            EpochOpened(job=job, epoch=0, manifest=manifest, digest=adapter.digest()),
        )

    async def close_round(self, job: str, *, lie: bool = False) -> None:
        """Move the adapter a little, in the log and here."""
        adapter = self.adapters[job]
        number = adapter.round + 1
        values = np.array([number * 1000, -500], np.int64)
        commit = Commit(0, [term(number, (0, 1), [(0, 2)], values)])
        adapter.apply(number, commit)
        closed = RoundClosed(
            job=job,
            epoch=0,
            round=number,
            reason="enough",
            commit=None if lie else commit,
            digest=adapter.digest(),
            detail_sequence=0,
        )
        await self.append(job, closed)

    def work(self, job: str, *, part: int = 0, evaluate: bool = False) -> WorkAssigned:
        adapter = self.adapters[job]
        return WorkAssigned(
            key=UpdateKey(job, 0, adapter.round + 1, DEVICE, part),
            digest=adapter.digest(),
            stream_round=adapter.round + 1,
            work=EvaluateWork() if evaluate else ProbeWork("probe", [(0, 4)]),
            eps=0.05,
            batch_rows=4,
            scope=(0, 1),
            deadline_s=10.0,
        )

    async def assign(self, work: Message | bytes) -> None:
        self.answers.append(work)
        await self.link.publish(subjects.wake(DEVICE), encode(WakeUp(job="any")))

    async def settle(self, update: SubmitUpdate, outcome: str = "folded") -> None:
        settled = UpdateSettled(key=update.key.text(), outcome=outcome)  # type: ignore[arg-type]
        await self.link.publish(subjects.settled(DEVICE), encode(settled))

    async def answering(self) -> None:
        async with self.link.subscribe(subjects.ALL_WORK) as requests:
            async for delivery in requests:
                self.requests.append(decode(delivery.data, RequestWork))
                answer = self.answers.pop(0) if self.answers else FAR
                data = answer if isinstance(answer, bytes) else encode(answer)
                await self.link.publish(delivery.reply, data)

    async def hearing(self) -> None:
        async with self.link.subscribe(subjects.ALL_REPORTS) as reports:
            async for delivery in reports:
                self.reports.append(decode(delivery.data, DeviceReport))

    async def receiving(self) -> None:
        async with self.link.subscribe(subjects.ALL_UPDATES) as updates:
            async for delivery in updates:
                self.keys.append(delivery.headers[subjects.KEY_HEADER])
                self.updates.append(decode(delivery.data, SubmitUpdate))


class Daemon:
    """`python -m edge_client`, killed and started as a test likes."""

    def __init__(self, folder: Path, url: str, *options: str) -> None:
        self.state = folder / "state"
        self._options = (
            *("--device", DEVICE, "--servers", url, "--state-dir", str(self.state)),
            *("--engine", "fake", "--log-level", "debug", *options),
        )
        self._log = folder / "edge.log"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "edge_client", *self._options), stderr=log
            )

    async def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()

    def rss_mb(self) -> float:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(x.split()[1]) for x in status.splitlines() if x[:5] == "VmHWM") / 1024

    def ledger(self) -> list[dict[str, object]]:
        lines = (self.state / "spool" / "ledger.jsonl").read_bytes().splitlines()
        return [json.loads(line) for line in lines]

    def spooled(self) -> list[str]:
        return sorted(path.stem for path in (self.state / "spool").glob("*.update"))


@pytest.fixture
async def fleet(broker: BrokerProcess) -> AsyncGenerator[Fleet, None]:
    link = await connect([broker.url], name="fleet")
    await ensure_streams(link)
    fleet = Fleet(link)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(task)
            for task in (fleet.answering(), fleet.hearing(), fleet.receiving())
        ]
        await link.flush()
        yield fleet
        for task in tasks:
            task.cancel()
    await link.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "m.gguf"
    path.parent.mkdir()
    path.write_text("{}")
    return path


def write(path: Path, text: str) -> None:
    path.write_text(text)


@asynccontextmanager
async def daemon(
    folder: Path, broker: BrokerProcess, *options: str
) -> AsyncGenerator[Daemon, None]:
    """A daemon with six rows of data, two of them malformed; killed at the end."""
    rows = [{"text": f"word{n} more", "label": ["up", "down"][n % 2]} for n in range(6)]
    data = folder / "rows.jsonl"
    lines = [json.dumps(row) for row in rows] + ["{", '{"text": 1}']
    data.write_text("\n".join(lines) + "\n")
    one = Daemon(
        folder,
        broker.url,
        "--data",
        str(data),
        "--heldout",
        str(data),
        "--trusted",
        "true",
        *options,
    )
    await one.start()
    try:
        yield one
    finally:
        await one.end(signal.SIGKILL)


async def test_it_measures_what_it_is_asked_and_drains_on_sigterm(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    for _ in range(3):
        await fleet.close_round("job")
    await blobs.put(fleet.link, model)
    async with daemon(tmp_path, broker) as edge:
        await wait_until(lambda: len(fleet.requests) == 1)
        assert fleet.reports[0].rows == 8
        assert edge.rss_mb() < 60
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 1)
        update = fleet.updates[0]
        assert fleet.keys == [update.key.text()] == ["job.0.4.dev-1.0"] == edge.spooled()
        assert update.digest == fleet.adapters["job"].digest()
        assert isinstance(update.result, ProbeResult)
        assert len(update.result.differences) == 16
        await wait_until(lambda: len(fleet.requests) == 3)
        assert fleet.requests[-1].last == update.key
        await fleet.assign(fleet.work("job", part=1, evaluate=True))
        await wait_until(lambda: len(fleet.updates) == 2)
        assert isinstance(fleet.updates[1].result, EvaluateResult)
        await wait_until(lambda: bool(fleet.report.speeds and fleet.report.speeds[0].evaluate_s))
        assert fleet.report.rows == fleet.report.heldout_rows == 6
        assert fleet.report.positions == {"job": f"3:{update.digest}"}
        assert fleet.count("model_downloads") == fleet.count("catch_up_replays") == 1
        assert fleet.count("rows_refused") == 4
        for one in fleet.updates:
            await fleet.settle(one)
        await wait_until(lambda: not edge.spooled())
        assert [fact["what"] for fact in edge.ledger()] == ["spooled"] * 2 + ["settled"] * 2
        assert edge.ledger()[0]["sum"] == sum(np.frombuffer(update.result.differences, "<i4"))
        assert not fleet.report.problem
        assert await edge.end(signal.SIGTERM) == 0
        await wait_until(lambda: fleet.report.problem == "stopped")
        await edge.start()
        await wait_until(lambda: not fleet.report.problem, what="a start clears it")
        log = tmp_path / "edge.log"
        await wait_until(lambda: log.read_text().count("waiting_for_work") == 2)
    text = (tmp_path / "edge.log").read_text()
    assert "Traceback" not in text
    told = [json.loads(line) for line in text.splitlines()]
    (refused,) = [line for line in told if line["event"] == "rows_refused"]
    assert (refused["count"], refused["of"]) == (4, 16)
    waiting = [line["why"] for line in told if line["event"] == "waiting_for_work"]
    assert waiting == ["nothing to do"] * 2, "once at each start, and not between two pieces"
    assert "work_timeout_s" not in told[0]["settings"], "only what differs from its default"


async def test_a_drain_without_a_broker_does_not_wait_for_its_goodbye(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path
) -> None:
    async with daemon(tmp_path, broker) as edge:
        await wait_until(lambda: len(fleet.requests) == 1)
        await broker.kill()
        async with asyncio.timeout(5):
            assert await edge.end(signal.SIGTERM) == 0
        await broker.start()


async def test_an_update_is_sent_again_after_a_kill(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    async with daemon(tmp_path, broker, "--models", str(model)) as edge:
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 1)
        assert await edge.end(signal.SIGKILL) == -signal.SIGKILL
        await edge.start()
        await wait_until(lambda: len(fleet.updates) == 2)
        assert fleet.updates[0] == fleet.updates[1]
        assert fleet.keys[0] == fleet.keys[1]
        await wait_until(lambda: fleet.requests[-1].last == fleet.updates[0].key)
        assert fleet.requests[-1].spooled == 1
        await fleet.settle(fleet.updates[1])
        await wait_until(lambda: not edge.spooled())
        assert await edge.end(signal.SIGTERM) == 0


async def test_it_goes_on_when_the_broker_was_killed(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    async with daemon(tmp_path, broker, "--models", str(model.parent)) as edge:
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 1)
        await broker.kill()
        await broker.start()
        await wait_until(lambda: fleet.link.connected)
        await wait_until(lambda: len(fleet.updates) >= 2, what="sent again after the reconnect")
        await ensure_streams(fleet.link)
        await fleet.close_round("job")
        await fleet.assign(fleet.work("job"))
        digest = fleet.adapters["job"].digest()
        await wait_until(lambda: any(update.digest == digest for update in fleet.updates))
        assert await edge.end(signal.SIGTERM) == 0


async def test_a_job_that_ends_is_let_go_at_its_final_position(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    async with daemon(tmp_path, broker, "--models", str(model)):
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 1)
        asked = len(fleet.requests)
        for _ in range(2):
            await fleet.close_round("job")
        digest = fleet.adapters["job"].digest()
        await fleet.append(
            "job", JobEnded(job="job", epoch=0, round=2, reason="finished", digest=digest)
        )
        await wait_until(lambda: fleet.report.positions.get("job") == f"2:{digest}")
        await wait_until(lambda: len(fleet.requests) > asked, what="asks what is next")


async def test_a_report_that_went_down_with_the_link_is_said_again(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    port = int(broker.url.rpartition(":")[2])
    async with start_proxy(port) as link:
        through = cast("BrokerProcess", SimpleNamespace(url=f"nats://127.0.0.1:{link.port}"))
        async with daemon(tmp_path, through, "--models", str(model)):
            await fleet.assign(fleet.work("job"))
            await wait_until(lambda: len(fleet.updates) == 1)
            heard = len(fleet.reports)
            link.swallow_requests()
            await fleet.close_round("job")
            digest = fleet.adapters["job"].digest()
            ended = JobEnded(job="job", epoch=0, round=1, reason="finished", digest=digest)
            await fleet.append("job", ended)
            await asyncio.sleep(0.5)
            assert len(fleet.reports) == heard, "what it says of the end is lost"
            link.cut()
            await wait_until(lambda: fleet.report.positions.get("job") == f"1:{digest}")


async def test_a_late_joiner_takes_the_snapshot_and_proves_it(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    for _ in range(150):
        await fleet.close_round("job")
    adapter = fleet.adapters["job"]
    snapshot = await blobs.put(fleet.link, adapter.to_bytes())
    await fleet.append(
        "job",
        ModelPublished(job="job", epoch=0, round=150, digest=adapter.digest(), snapshot=snapshot),
    )
    await fleet.close_round("job")
    async with daemon(tmp_path, broker, "--models", str(model)):
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 1)
        assert fleet.updates[0].digest == adapter.digest()
        await wait_until(lambda: fleet.count("catch_up_snapshots") == 1)
        assert fleet.count("catch_up_replays") == 0


async def test_it_never_measures_at_an_adapter_that_is_not_the_logs(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    await fleet.close_round("job", lie=True)
    async with daemon(tmp_path, broker, "--models", str(model)):
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: "the log says" in fleet.declined)
        await wait_until(lambda: fleet.count("digest_mismatches") == 3)
        assert any("the log says" in why for why in fleet.report.unable.values())
        assert not fleet.updates
        await fleet.open_job("other", model)
        await fleet.assign(fleet.work("other"))
        await wait_until(lambda: len(fleet.updates) == 1, what="other jobs go on")


async def test_work_that_ends_the_engine_twice_is_declined(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    """The first model aborts once, and its work is done; the second always does."""
    once = tmp_path / "abort-once"
    always = model.with_name("always.gguf")
    write(once, "")
    write(model, json.dumps({"abort_file": str(once)}))
    write(always, json.dumps({"abort": True}))
    await fleet.open_job("job", model)
    await fleet.open_job("deadly", always)
    async with daemon(tmp_path, broker, "--models", str(model.parent)) as edge:
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 1)
        await wait_until(lambda: fleet.count("engine_deaths") == 1)
        await fleet.assign(fleet.work("deadly"))
        await wait_until(lambda: "ended the engine 2 times" in fleet.declined)
        await fleet.close_round("job")
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 2, what="the first job goes on")
        assert fleet.updates[1].digest == fleet.adapters["job"].digest()
        assert await edge.end(signal.SIGTERM) == 0


async def test_a_kind_of_work_from_the_future_is_declined(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    future: dict[str, object] = msgpack.unpackb(encode(fleet.work("job")))
    future["work"] = {"kind": "tokens", "prompts": [1, 2]}
    async with daemon(tmp_path, broker, "--models", str(model)):
        await wait_until(lambda: len(fleet.requests) == 1)
        await fleet.assign(bytes(msgpack.packb(future) or b""))
        await wait_until(lambda: "does not know" in fleet.declined)
        assert "tokens" in fleet.declined
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: len(fleet.updates) == 1)
        await wait_until(lambda: fleet.count("work_declined") == 1)


async def test_a_full_spool_is_told_and_gets_over(
    fleet: Fleet, broker: BrokerProcess, tmp_path: Path, model: Path
) -> None:
    await fleet.open_job("job", model)
    async with daemon(tmp_path, broker, "--models", str(model)) as edge:
        await wait_until(lambda: len(fleet.requests) == 1)
        spool = edge.state / "spool"
        spool.rename(spool.with_name("away"))
        spool.touch()
        await fleet.assign(fleet.work("job"))
        await wait_until(lambda: f"free space at {spool}" in fleet.report.problem)
        assert not fleet.updates
        spool.unlink()
        spool.with_name("away").rename(spool)
        await wait_until(lambda: len(fleet.updates) == 1)
        await wait_until(lambda: not fleet.report.problem)
        assert fleet.count("spool_full") == 1
