"""A real device, its real engine and a real fleet: data that comes while the job runs."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from deploy.demo.processes import Child
from shared import blobs, subjects
from shared.bus import Link
from shared.codec import decode, encode_manifest
from shared.engine.llama import LlamaEngine
from shared.messages import (
    Block,
    DeviceReport,
    Evaluation,
    JobAccepted,
    JobSpec,
    Manifest,
    Pacing,
    RoundClosed,
    SubmitJob,
    Task,
    Tuning,
    Variant,
)
from tests.support import tiny_gguf
from tests.support.fleet import Fleet, a_fleet
from tests.support.waiting import wait_until

TASK = Task("choices", "{text}\nAnswer:", {"0": " a", "1": " b"}, max_tokens=64)
SPEC = JobSpec(
    task=TASK,
    tuning=Tuning(how="exact", rounds=100_000, directions=16, batch_rows=1000, step=0.01),
    pacing=Pacing(enough_devices=1, enough_probes=1, deadline_s=2.0),
    evaluation=Evaluation(every_rounds=0),
)


def a_row(number: int) -> str:
    return json.dumps({"text": f"in the {number}", "label": number % 2}) + "\n"


class Heard:
    """What the device says of itself, and what each closed round weighed."""

    def __init__(self) -> None:
        self.report: DeviceReport | None = None
        self.weights: list[int] = []

    @property
    def problem(self) -> str:
        return self.report.problem if self.report else ""

    @property
    def rows(self) -> int:
        return self.report.rows if self.report else -1

    async def reports(self, bus: Link) -> None:
        async with bus.subscribe(subjects.ALL_REPORTS) as deliveries:
            async for delivery in deliveries:
                self.report = decode(delivery.data, DeviceReport)

    async def rounds(self, fleet: Fleet, job: str) -> None:
        async for event in fleet.facts(job):
            if isinstance(event, RoundClosed) and event.weight:
                self.weights.append(event.weight)


@asynccontextmanager
async def a_device(fleet: Fleet, data: Path, model: Path) -> AsyncGenerator[Child, None]:
    device = Child(
        "grower",
        "edge_client",
        [
            *("--device", "grower", "--servers", fleet.broker.url, "--log-level", "debug"),
            *("--data", str(data), "--models", str(model)),
            *("--state-dir", str(fleet.folder / "state" / "grower")),
        ],
        fleet.folder / "grower.log",
    )
    await device.start()
    try:
        yield device
    finally:
        await device.stop()


def a_job(model: Path) -> SubmitJob:
    facts = LlamaEngine().inspect(str(model), list(TASK.labels.values()), TASK.template)
    block = Block("output_rows", "output.weight", [2, facts.n_embd], rows=facts.tokens)
    ref = blobs.reference(model)
    manifest = Manifest(
        epoch=0,
        architecture=facts.architecture,
        seed=7,
        blocks=[block],
        variants=[Variant(ref.digest, ref.size_bytes, model.name)],
        d=2 * facts.n_embd,
    )
    return SubmitJob(job="grow", spec=SPEC, manifest=encode_manifest(manifest))


async def test_rows_that_come_while_a_job_runs_take_part_from_the_next_round_on(
    tmp_path: Path,
) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf", quantized=False)
    data = tmp_path / "data"
    data.mkdir()
    heard = Heard()
    async with a_fleet(tmp_path, devices=0) as fleet, asyncio.TaskGroup() as group:
        listening = group.create_task(heard.reports(fleet.bus))
        async with a_device(fleet, data, model) as device:
            await wait_until(
                lambda: f"no usable row yet in {data}" in heard.problem, what="it waits and says so"
            )
            assert isinstance(await fleet.submit(a_job(model)), JobAccepted)
            following = group.create_task(heard.rounds(fleet, "grow"))

            (data / "a.jsonl").write_text(a_row(1) + a_row(2) + a_row(3) + '{"text": "in th')
            await wait_until(
                lambda: 3 in heard.weights, timeout_s=30, what="it starts when they come"
            )
            await wait_until(lambda: (heard.rows, heard.problem) == (3, ""), timeout_s=15)

            with (data / "a.jsonl").open("a") as file:
                file.write('e 4", "label": 0}\n')
            (data / "b.csv").write_text('text,label\n"in the\nbin",1\nbroken\nin the,0\n')
            await wait_until(lambda: 6 in heard.weights, what="later rounds weigh what has come")
            await wait_until(lambda: heard.rows == 6, timeout_s=15, what="the report follows")
            assert heard.report is not None
            assert heard.report.counters["rows_refused"] == 1
            assert f"{data / 'b.csv'}:4: it has 1 cells" in (tmp_path / "grower.log").read_text()

            await wait_until(lambda: heard.weights[-1:] == [6])
            (data / "a.jsonl").unlink()
            await wait_until(lambda: heard.weights[-1] == 2, what="what is gone is not used")
            wanted = [weight for weight in heard.weights if weight in {3, 6, 2}]
            assert list(dict.fromkeys(wanted)) == [3, 6, 2]

            log = (tmp_path / "grower.log").read_text()
            assert len(re.findall("engine_started", log)) == 1, "nothing restarts"
            assert "Traceback" not in log
            assert device.running
            await wait_until(lambda: heard.rows == 2, timeout_s=15)
            following.cancel()
        listening.cancel()
