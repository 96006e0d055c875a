"""The live page in a real browser: telemetry, its broker and every message on it are real."""

import asyncio
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.demo.processes import Child
from services.console.addresses import free_port
from shared import nats_bus, subjects
from shared.broker import BrokerProcess
from shared.codec import encode
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.messages import (
    AdapterEvaluated,
    BlobRef,
    ConnectionRefused,
    Contribution,
    DecisionMade,
    JobOpened,
    JobSpec,
    ModelPublished,
    RoundReport,
    Task,
    Tuning,
    UpdateSettled,
)
from tests.support.chromium import Page, chromium, find_chromium
from tests.support.facts import DIGEST, device_report, round_closed, round_opened
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="there is no chromium: apt-get install chromium"
)

PHONE, DESKTOP = (360, 780), (1280, 900)
SCRIPT = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
START_S = 30.0


@dataclass
class Stage:
    """A broker with a log, a telemetry process that follows it, and a tab."""

    bus: nats_bus.NatsBus
    log: LogWriter
    detail: LogWriter
    telemetry: Child
    url: str
    page: Page

    async def opens(self, round: int, *, evaluate: bool = False) -> None:
        opened = round_opened(
            round,
            directions=64,
            evaluate=evaluate,
            enough_devices=2,
            enough_probes=64,
            over_selection=1.3,
            deadline_s=30.0,
        )
        await self.log.append("demo", opened)

    async def closes(self, round: int, reason: str = "enough", **different: Any) -> None:
        usual: dict[str, Any] = {
            "updates": 2,
            "late": 1,
            "devices": 2,
            "probes": 64,
            "weight": 8,
            "loss": 2.0 / round,
            "signal": 1.5,
        }
        closed = round_closed(round, reason=reason, **usual | different)
        await self.log.append("demo", closed)

    async def reports(self, device: str, *, problem: str = "", rows: int = 40) -> None:
        counters = {"reconnects": 3, "link_bytes_in": 4_200_000, "link_bytes_out": 1_300}
        report = device_report(
            device,
            cores=4,
            memory_mb=2048,
            rows=rows,
            models=[DIGEST],
            counters=counters,
            problem=problem,
        )
        await self.bus.publish(subjects.report(device), encode(report))

    async def assigns(self, device: str, round: int) -> None:
        decision = DecisionMade(
            job="demo",
            round=round,
            device=device,
            part=0,
            kind="probe",
            probes=32,
            reason="one of 3 called, wave 1",
            index=1.25,
            mean=0.5,
            plays=4,
        )
        await self.bus.publish(subjects.decision("demo"), encode(decision))

    async def shows(self, text: str, within: str = "body") -> None:
        """Return once the page shows the text."""

        async def shown() -> bool:
            found = await self.page.value(f"document.querySelector('{within}')?.innerText ?? ''")
            return text in found

        await wait_until(shown, timeout_s=20.0, what=f"{text!r} in {within}")

    async def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        expression = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return await self.page.value(expression)


LABELLED = Task(loss="choices", template="{text}", labels={"a": "yes", "b": "no"})


def a_spec(rounds: int, task: Task = LABELLED) -> JobSpec:
    return JobSpec(task=task, tuning=Tuning(rounds=rounds))


@asynccontextmanager
async def staged(folder: Path, broker: BrokerProcess) -> AsyncGenerator[Stage]:
    bus = await nats_bus.connect([broker.url], name="test")
    port = free_port()
    arguments = ["--servers", broker.url, "--port", str(port)]
    telemetry = Child("telemetry", "services.telemetry", arguments, folder / "telemetry.log")
    try:
        await ensure_streams(bus)
        log = await LogWriter.open(bus, subjects.LOG_STREAM)
        detail = await LogWriter.open(bus, subjects.DETAIL_STREAM)
        await telemetry.start()
        async with chromium(folder) as page:
            url = f"http://127.0.0.1:{port}/"
            stage = Stage(bus, log, detail, telemetry, url, page)
            await log.append("demo", JobOpened(job="demo", spec=a_spec(20)))
            await wait_until(lambda: listening(port), timeout_s=START_S, what="telemetry listens")
            await page.size(*DESKTOP)
            await page.go(url)
            await stage.shows("live", "#link")
            yield stage
    finally:
        await telemetry.stop()
        await bus.close()


async def listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def width_of(png: Path) -> int:
    return struct.unpack(">I", png.read_bytes()[16:20])[0]


async def test_the_page_shows_a_job_as_it_goes_and_strangers_words_as_words(
    tmp_path: Path, broker: BrokerProcess
) -> None:
    async with staged(tmp_path, broker) as stage:
        page = stage.page
        for round in range(1, 8):
            await stage.opens(round, evaluate=round == 5)
            await stage.closes(round, "deadline" if round == 3 else "enough")
        evaluated = AdapterEvaluated(
            job="demo",
            epoch=0,
            round=5,
            digest=DIGEST,
            examples=8,
            correct=7,
            weight=8,
            loss=2.0,
            detail_sequence=5,
        )
        await stage.log.append("demo", evaluated)
        published = ModelPublished(
            job="demo", epoch=0, round=5, digest=DIGEST, snapshot=BlobRef("a" * 64, 5_300)
        )
        await stage.log.append("demo", published)
        contribution = Contribution("tablet", 1, 32, 8, 0.5, 2.0, 1)
        await stage.detail.append(
            "demo", RoundReport(job="demo", epoch=0, round=7, contributions=[contribution])
        )
        await stage.opens(8)
        await stage.reports("phone", problem=SCRIPT)
        await stage.reports("tablet")
        await stage.assigns("tablet", 8)
        refused = UpdateSettled(key="demo.0.6.tablet.0", outcome="too_late", reason=SCRIPT)
        await stage.bus.publish(subjects.settled("tablet"), encode(refused))
        stranger = ConnectionRefused(reason="nobody enrolled its key", name=SCRIPT, count=2)
        await stage.bus.publish(subjects.REFUSED, encode(stranger))

        await stage.shows("8 of 20", "#figure-round")
        await stage.shows("87.5%", "#figure-accuracy")
        await stage.shows("0.250", "#figure-heldout")
        await stage.shows("7", "#figure-late")
        lanes = "#lanes .lane-{} .count"
        await stage.shows("6", lanes.format("enough"))
        await stage.shows("1", lanes.format("deadline"))
        await stage.shows("probe, round 8", "#devices")
        await stage.shows("4.2 MB", "#devices")
        await stage.shows("1.25", "#arms")
        await stage.shows("one of 3 called, wave 1", "#arms")
        await stage.shows("too late demo.0.6.tablet.0", "#refused-updates")
        await stage.shows("nobody enrolled its key", "#refused-connections")
        await stage.shows("5.3 kB", "#published")
        await stage.shows("open", "#readout")
        for place in ("#devices", "#refused-updates", "#refused-connections"):
            await stage.shows(SCRIPT, place)

        await page.value("document.querySelector('#scrub').focus()")
        for _ in range(5):
            await page.press("ArrowLeft")
        await stage.shows("deadline", "#readout")

        without_answers = a_spec(7, Task(loss="tokens"))
        hides = "['#tile-accuracy', '#chart-accuracy'].map((e) => document.querySelector(e).hidden)"
        assert await page.value(hides) == [False, False]
        await stage.log.append("second", JobOpened(job="second", spec=without_answers))
        await stage.shows("0 of 7", "#figure-round")  # the page follows the newest job
        await stage.shows("every 50 rounds and at the end", "#published")
        assert await page.value(hides) == [True, True]
        choose = "const s = document.querySelector('#job'); s.value = 'demo'; "
        await page.value(f"(() => {{ {choose} s.dispatchEvent(new Event('change')); }})()")
        await stage.shows("8 of 20", "#figure-round")
        assert await page.value("location.search") == "?job=demo"

        await page.size(*PHONE)
        assert await stage.overflow() <= 0
        png = await page.picture(tmp_path / "phone.png")
        assert width_of(png) == 2 * PHONE[0]  # two dots a pixel: nothing sticks out to the right
        light = await page.value("getComputedStyle(document.body).backgroundColor")
        await page.prefer(color_scheme="dark")
        assert await page.value("getComputedStyle(document.body).backgroundColor") != light

        assert await page.value("document.title") == "demo · Seedwire"
        assert await page.value("document.querySelectorAll('main img, main script').length") == 0
        assert not page.complaints
        assert {one.split("?")[0].rpartition("/")[0] + "/" for one in page.requested} == {stage.url}


async def test_a_thousand_devices_are_searched_sorted_and_followed(
    tmp_path: Path, broker: BrokerProcess
) -> None:
    async with staged(tmp_path, broker) as stage:
        page = stage.page
        await stage.opens(1)
        for number in range(1000):
            problem = "its disk is full" if number == 321 else ""
            await stage.reports(f"device-{number}", problem=problem, rows=number)
        await stage.shows("999", "#states")
        await stage.shows("showing 25 of 1,000", "#devices-count")
        shown = "[...document.querySelectorAll('#devices tbody th > :first-child')]"
        names = f"{shown}.map((one) => one.textContent)"
        assert (await page.value(names))[:3] == ["device-0", "device-1", "device-2"]
        assert len(await page.value(names)) == 25
        await page.value("document.querySelector('#devices .c-rows button').click()")
        assert (await page.value(names))[:2] == ["device-999", "device-998"]
        await page.value("document.querySelector('#devices-more').click()")
        assert len(await page.value(names)) == 50
        search = "const s = document.querySelector('#search'); s.value = 'DISK'; "
        await page.value(f"(() => {{ {search} s.dispatchEvent(new Event('input')); }})()")
        assert await page.value(names) == ["device-321"]
        search = search.replace("DISK", "device-77")
        await page.value(f"(() => {{ {search} s.dispatchEvent(new Event('input')); }})()")
        await stage.shows("of 11", "#devices-count")
        await stage.assigns("device-777", 1)
        await stage.shows("probe, round 1", "#devices")
        await page.size(*PHONE)
        assert await stage.overflow() <= 0
        assert not page.complaints


async def test_the_page_finds_telemetry_again_and_shows_what_is_so_now(
    tmp_path: Path, broker: BrokerProcess
) -> None:
    async with staged(tmp_path, broker) as stage:
        await stage.opens(1)
        await stage.reports("before")
        await stage.shows("before", "#devices")
        await stage.telemetry.kill()
        await stage.shows("connection lost", "#link")
        await stage.closes(1)
        await stage.opens(2)
        await stage.telemetry.start()
        await stage.shows("live", "#link")
        await stage.shows("2 of 20", "#figure-round")
        await stage.shows("No device.", "#devices")  # no report is kept: none is remembered


async def test_why_each_round_closed_and_with_what_signal_is_on_the_page(
    tmp_path: Path, broker: BrokerProcess
) -> None:
    async with staged(tmp_path, broker) as stage:
        for round in range(1, 5):
            await stage.opens(round)
        await stage.closes(1, more=True, signal=0.12, variance=0.731)
        await stage.closes(2, "deadline", signal=1.07, variance=0.0925)
        await stage.closes(3, "abandoned", signal=None)
        await stage.page.value("document.querySelector('#rounds-details').open = true")
        await stage.shows("abandoned", "#rounds")
        cells = "[...r.cells].filter((c, n) => [0, 1, 6, 7].includes(n)).map((c) => c.innerText)"
        rows = f"[...document.querySelectorAll('#rounds tbody tr')].map((r) => {cells})"
        assert await stage.page.value(rows) == [
            ["4", "open", "–", "–"],
            ["3", "abandoned", "–", "–"],
            ["2", "deadline", "1.07", "0.0925"],
            ["1", "more on the same batch", "0.120", "0.731"],
        ]
        await stage.shows("1", "#lanes .lane-more .count")
        await stage.shows("2 of 20", "#figure-round")  # two of four moved nothing
        await stage.page.value("document.querySelector('#scrub').focus()")
        for _ in range(3):
            await stage.page.press("ArrowLeft")
        for said in ("more on the same batch", "signal to noise 0.120", "variance 0.731"):
            await stage.shows(said, "#readout")
        await stage.page.size(*PHONE)
        assert await stage.overflow() <= 0
        assert not stage.page.complaints
