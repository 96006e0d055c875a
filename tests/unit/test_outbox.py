"""Updates on their way: what overtakes what, and a disk that is full just then."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from edge_client.outbox import Outbox
from edge_client.spool import Spool
from shared import subjects
from shared.clock import SystemClock
from shared.codec import encode
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import ProbeResult, SubmitUpdate, UpdateKey, UpdateSettled
from shared.metrics import Counters
from tests.chaos.disks import Platters, SimulatedDisk
from tests.support.waiting import wait_until

KEY = UpdateKey("job", 0, 1, "dev", 0)


class SettledMeanwhile(Spool):
    """Lets go of an update while another thread reads it."""

    def read(self, key: str) -> bytes | None:
        data = super().read(key)
        self.settle(key, "folded")
        return data


def an_update() -> SubmitUpdate:
    result = ProbeResult("probe", [(0, 1)], b"abcd", b"", 9, 4)
    return SubmitUpdate(key=KEY, digest="a" * 64, result=result, work_s=0.5)


@asynccontextmanager
async def sending(bus: MemoryBus, spool: Spool, counters: Counters) -> AsyncGenerator[Outbox, None]:
    """An outbox that hears what is settled and sends again."""
    outbox = Outbox(bus, spool, "dev", counters, SystemClock(), lambda text: None)
    async with bus.subscribe(subjects.settled("dev"), gaps=True) as words:
        tasks = [
            asyncio.create_task(outbox.settling(words, lambda: None)),
            asyncio.create_task(outbox.resending()),
        ]
        yield outbox
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_update_that_is_settled_while_it_is_read_ends_nothing(tmp_path: Path) -> None:
    spool = SettledMeanwhile(tmp_path, max_bytes=1 << 20)
    counters = Counters()
    bus = MemoryBroker().connect("dev")
    outbox = Outbox(bus, spool, "dev", counters, SystemClock(), lambda text: None)
    await outbox.keep(an_update())
    assert counters.get("updates_sent") == 1  # once more than needed: a duplicate is harmless
    await outbox.send(KEY.text())
    assert counters.get("updates_sent") == 1
    assert spool.keys == []


async def test_a_word_that_found_the_disk_full_is_in_the_ledger_once_there_is_room() -> None:
    platters = Platters(random.Random(1))
    spool = Spool(Path("spool"), max_bytes=1 << 20, disk=SimulatedDisk(platters, lambda step: None))
    bus = MemoryBroker().connect("dev")
    async with sending(bus, spool, Counters()) as outbox:
        await outbox.keep(an_update())
        platters.full = True
        word = UpdateSettled(key=KEY.text(), outcome="too_late")
        await bus.publish(subjects.settled("dev"), encode(word))
        await wait_until(lambda: spool.untold)
        platters.full = False
        bus.cut_off()
        bus.reconnected()  # or some minutes later
        await wait_until(lambda: not spool.untold)
    assert b'"outcome":"too_late"' in platters.names["ledger.jsonl"].data
    assert list(platters.names) == ["ledger.jsonl"]
