"""Opening a version over a large model: nothing is left half open, what cannot serve is named."""

import asyncio
from pathlib import Path

import pytest

from services.proxy_inference.ensemble.counts import Counts
from services.proxy_inference.ensemble.large import Large
from services.proxy_inference.pool import Pool
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import Room
from services.proxy_inference.worker import Worker
from shared.errors import EngineError
from tests.support import tiny_gguf
from tests.support.waiting import wait_until


async def test_who_gives_up_waiting_for_a_version_leaves_nothing_half_open(tmp_path: Path) -> None:
    """As a client does that names an old version and hangs up."""
    small = ModelFile(tiny_gguf.write(tmp_path / "small.gguf"), "small")
    large = ModelFile(tiny_gguf.write(tmp_path / "large.gguf"), "large")
    worker = Worker()
    pool = Pool(worker, Room(512, 2, 1), Large(large, Counts(), speculates=True))
    for patience_s in (0.02, 0.1, 0.3):
        opening = asyncio.create_task(pool.open(None, None, None, small, asked_for=True))
        await asyncio.sleep(patience_s)
        opening.cancel()
        await asyncio.wait({opening})

    async def there() -> bool:
        return bool(pool.alive)

    await wait_until(there, timeout_s=10, what="the version")
    held = await pool.open(None, None, None, small)
    assert pool.alive == [held]
    assert held.ensemble is not None
    assert held.generation.weights.users == 1
    worker.stop()
    await worker.ended
    await pool.close()
    assert held.generation.weights.users == 0


def test_a_large_model_that_cannot_take_back_what_it_read_is_refused(tmp_path: Path) -> None:
    file = ModelFile(tiny_gguf.write_recurrent(tmp_path / "mamba.gguf"), "mamba")
    with pytest.raises(EngineError, match=r"mamba\.gguf: a model with a recurrent state"):
        Large(file, Counts(), speculates=False)
