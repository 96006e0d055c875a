"""A device's copy of an adapter: what it never stood at, it does not claim to stand at."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_client.history import Link
from edge_client.replica import Device, DigestMismatch, Replica
from edge_client.state import Position
from shared import blobs
from shared.clock import SystemClock
from shared.engine.protocol import Opened, OpenJob, Restore, Standing
from shared.errors import EngineError, TransientError
from shared.log import ensure_streams
from shared.memory_bus import MemoryBroker
from shared.messages import BlobRef, EpochOpened
from shared.metrics import Counters
from tests.support.jobs import a_job

START, ELSEWHERE = "5" * 64, "e" * 64
OLD = Position(sequence=9, epoch=0, round=3, digest="0" * 64)


class AnEngine:
    """Opens every job at theta = 0, and then does as it is told."""

    life = 0

    def __init__(self, restored: Standing | Exception) -> None:
        self._restored = restored

    async def ask(self, request: object, _: object, *, life: int) -> object:
        assert life == self.life
        if isinstance(request, OpenJob):
            return cast("Opened", SimpleNamespace(digest="1" * 64, rows=1))
        assert isinstance(request, Restore)
        if isinstance(self._restored, Exception):
            raise self._restored
        return self._restored


async def a_replica(folder: Path, restored: Standing | Exception) -> tuple[Replica, BlobRef]:
    """One that stands at `OLD`, and the snapshot that the next epoch starts with."""
    link = MemoryBroker().connect("device")
    await ensure_streams(link)

    async def find(_: object) -> Path:
        return folder / "model.gguf"

    nothing: Any = SimpleNamespace(data="", heldout="", find=find)
    engine: Any = AnEngine(restored)
    device = Device(
        name="d",
        rows=nothing,
        threads=1,
        state_dir=folder,
        streams=link,
        engine=engine,
        models=nothing,
        counters=Counters(),
        link=Link(),
        clock=SystemClock(),
        opened=lambda _: None,
    )
    replica = Replica(device, "demo", lambda: None)
    replica.position, replica._life = OLD, 0  # pyright: ignore[reportPrivateUsage]
    return replica, await blobs.put(link, b"a snapshot")


def an_epoch(start: BlobRef) -> EpochOpened:
    return EpochOpened(job="demo", epoch=1, manifest=a_job().manifest, digest=START, start=start)


async def test_an_epoch_begins_at_its_start(tmp_path: Path) -> None:
    replica, start = await a_replica(tmp_path, Standing(round=3, digest=START))
    await replica.open(a_job().spec, an_epoch(start), 20)
    assert replica.alive
    assert replica.position == Position(20, 1, 3, START)


@pytest.mark.parametrize("restored", [EngineError("refused"), OSError(28, "No space left")])
async def test_who_does_not_get_to_the_start_stands_nowhere(
    tmp_path: Path, restored: Exception
) -> None:
    replica, start = await a_replica(tmp_path, restored)
    with pytest.raises(type(restored)):
        await replica.open(a_job().spec, an_epoch(start), 20)
    assert not replica.alive  # at theta = 0, where no round was ever opened


async def test_a_start_that_is_elsewhere_or_nowhere_is_no_place_to_measure(tmp_path: Path) -> None:
    replica, start = await a_replica(tmp_path, Standing(round=3, digest=ELSEWHERE))
    with pytest.raises(DigestMismatch):
        await replica.open(a_job().spec, an_epoch(start), 20)
    assert not replica.alive
    replica, _ = await a_replica(tmp_path, Standing(round=3, digest=START))
    with pytest.raises(TransientError):
        await replica.open(a_job().spec, an_epoch(BlobRef("f" * 64, 10)), 20)
    assert not replica.alive
