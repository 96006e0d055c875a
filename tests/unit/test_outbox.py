"""Updates on their way: what overtakes what, and what comes of it."""

from pathlib import Path

from edge_client.outbox import Outbox
from edge_client.spool import Spool
from shared.clock import SystemClock
from shared.memory_bus import MemoryBroker
from shared.messages import ProbeResult, SubmitUpdate, UpdateKey
from shared.metrics import Counters


class SettledMeanwhile(Spool):
    """Lets go of an update while another thread reads it."""

    def read(self, key: str) -> bytes | None:
        data = super().read(key)
        self.settle(key, "folded")
        return data


def an_update() -> SubmitUpdate:
    return SubmitUpdate(
        key=UpdateKey("job", 0, 1, "dev", 0),
        digest="a" * 64,
        result=ProbeResult("probe", [(0, 1)], b"abcd", b"", 9, 4),
        work_s=0.5,
    )


async def test_an_update_that_is_settled_while_it_is_read_ends_nothing(tmp_path: Path) -> None:
    spool = SettledMeanwhile(tmp_path, max_bytes=1 << 20)
    troubles: list[str] = []
    counters = Counters()
    bus = MemoryBroker().connect("dev")
    outbox = Outbox(bus, spool, "dev", counters, SystemClock(), troubles.append)
    await outbox.keep(an_update())
    assert counters.get("updates_sent") == 1  # once more than needed: a duplicate is harmless
    await outbox.send(an_update().key.text())
    assert counters.get("updates_sent") == 1
    assert spool.keys == []
