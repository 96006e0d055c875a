"""A device that was away for 500 rounds: how long until its work counts again, and its bytes.

Real processes and a real broker; the fake engine with an adapter of 1e5 numbers and 512 directions
a round, as in `wire`. Three devices are at a job that wants two; the link of the third is cut for
500 rounds, and its wall clock is seven hours behind all the while. Then one of the others stops, so
that the open round waits for the third, and the link comes back. Measured from that moment: seconds
until an update of it is counted in the open round (so its digest was the log's), and all bytes on
its link till then. It chooses replay or snapshot itself; the baseline is the same with the other
way alone, on a job that publishes no snapshot meanwhile. `away.restarted_*`: the device was
switched off instead of cut off, and begins with nothing but its files.
"""

import asyncio
import random
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from deploy.demo.link import CLEAR, Link
from deploy.demo.processes import Child
from shared import subjects
from shared.codec import decode
from shared.engine.fake import MIXER
from shared.log import follow_detail
from shared.messages import (
    STOPPED,
    Block,
    DeviceReport,
    Evaluation,
    JobSpec,
    Pacing,
    Tuning,
    UpdatesFolded,
)
from tests.bench.figure import Figure
from tests.support.fleet import Fleet, a_fleet, a_task, rows, write_rows
from tests.support.waiting import wait_until

ROUNDS, DIRECTIONS, PROBES, WIDTH, SLOTS = 500, 512, 64, 1024, 98
SETTLE_S = 1.0
PATIENCE_S = 900.0
TARGET_S = 60.0
BEHIND_S = 7 * 3600
AWAY = "d2"

_CLOCK = f"""
import time
_real = time.time
time.time = lambda: _real() - {BEHIND_S}
"""


@dataclass(frozen=True)
class Back:
    """How one device came back."""

    seconds: float
    size_bytes: int
    snapshots: int


async def figures() -> list[Figure]:
    chosen = await returned(snapshot_every=50, restart=False)
    replayed = await returned(snapshot_every=100_000, restart=False)
    restarted = await returned(snapshot_every=50, restart=True)
    assert replayed.snapshots == 0
    return [
        Figure("away.seconds", chosen.seconds, "s", replayed.seconds, target=TARGET_S),
        Figure("away.bytes", chosen.size_bytes, "B", replayed.size_bytes),
        Figure("away.took_snapshot", chosen.snapshots, ""),
        Figure("away.restarted_seconds", restarted.seconds, "s", target=TARGET_S),
        Figure("away.restarted_bytes", restarted.size_bytes, "B"),
    ]


async def returned(*, snapshot_every: int, restart: bool, rounds: int = ROUNDS) -> Back:
    """One absence of `rounds` rounds, and the return."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "clock"
        clock.mkdir()
        (clock / "sitecustomize.py").write_text(_CLOCK)
        async with a_fleet(Path(folder), devices=2, model={"n_embd": WIDTH}) as fleet:
            link = Link(fleet.broker.port, CLEAR, random.Random(1))
            await link.start()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    away = await _device(fleet, link.port, clock)
                    return await _absence(fleet, away, link, snapshot_every, rounds, restart)
            finally:
                await link.stop()


async def _device(fleet: Fleet, port: int, clock: Path) -> Child:
    """The device that will be away, with a wrong wall clock."""
    data = write_rows(fleet.folder / f"{AWAY}.jsonl", rows(40, offset=80))
    arguments = ["--device", AWAY, "--servers", f"nats://127.0.0.1:{port}", "--engine", "fake"]
    arguments += ["--data", str(data), "--state-dir", str(fleet.folder / "state" / AWAY)]
    arguments += ["--models", str(fleet.model)]
    log = fleet.folder / f"{AWAY}.log"
    child = Child(AWAY, "edge_client", arguments, log, {"PYTHONPATH": str(clock)})
    fleet.devices[AWAY] = child
    await child.start()
    return child


async def _absence(
    fleet: Fleet, away: Child, link: Link, snapshot_every: int, rounds: int, restart: bool
) -> Back:
    blocks = [Block("lora_b", MIXER, [WIDTH], slot=slot, d_in=WIDTH) for slot in range(SLOTS)]
    seen = _Seen(fleet)
    async with asyncio.TaskGroup() as tasks:
        listening = [tasks.create_task(seen.details()), tasks.create_task(seen.reports())]
        await fleet.submit(fleet.job("away", _spec(snapshot_every, rounds), blocks))
        await wait_until(lambda: seen.counted[AWAY] > 2, timeout_s=60)
        gone_at = seen.newest
        if restart:
            await away.kill()
        link.cut(PATIENCE_S)
        await wait_until(lambda: seen.newest >= gone_at + rounds, timeout_s=PATIENCE_S)
        await fleet.devices["d1"].stop()
        await asyncio.sleep(SETTLE_S)
        opened, size_bytes = seen.newest, link.bytes_up + link.bytes_down
        link.mend()
        began = time.monotonic()
        if restart:
            await away.start()
        await wait_until(lambda: seen.counted[AWAY] >= opened, timeout_s=PATIENCE_S)
        seconds = time.monotonic() - began
        size_bytes = link.bytes_up + link.bytes_down - size_bytes
        await away.stop()  # it says goodbye, and what it has counted
        await wait_until(lambda: seen.said is not None and seen.said.problem == STOPPED)
        for task in listening:
            task.cancel()
    assert seen.said is not None
    counters = seen.said.counters
    return Back(seconds, size_bytes, counters.get("catch_up_snapshots", 0))


class _Seen:
    """What the log's private half and the device itself have said so far."""

    def __init__(self, fleet: Fleet) -> None:
        self._bus = fleet.bus
        self.counted: Counter[str] = Counter()
        """By device, the newest round in which an update of it was counted in time."""
        self.newest = 0
        self.said: DeviceReport | None = None

    async def details(self) -> None:
        async with aclosing(follow_detail(self._bus, self._bus, check_s=0.5)) as events:
            async for _, event in events:
                if isinstance(event, UpdatesFolded):
                    self.newest = max(self.newest, event.round)
                    for row in event.updates:
                        if row.outcome == "folded":
                            self.counted[row.device] = max(self.counted[row.device], row.round)

    async def reports(self) -> None:
        async with self._bus.subscribe(subjects.report(AWAY)) as deliveries:
            async for delivery in deliveries:
                self.said = decode(delivery.data, DeviceReport)


def _spec(snapshot_every: int, rounds: int) -> JobSpec:
    """Rounds that any two devices fill, each with all of the pool's directions."""
    return JobSpec(
        task=a_task(),
        tuning=Tuning(
            how="probe", rounds=2 * rounds + 100, directions=DIRECTIONS, batch_rows=2, step=1e-3
        ),
        pacing=Pacing(
            enough_devices=2,
            enough_probes=PROBES,
            deadline_s=PATIENCE_S,
            over_selection=1.5,
        ),
        evaluation=Evaluation(every_rounds=0),
        snapshot_every=snapshot_every,
    )
