"""What the default method makes of the moves that devices send as products with directions."""

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from services.aggregator.methods.method import RoundSums
from services.aggregator.methods.seedwire import Seedwire
from services.aggregator.pooling import Pool
from shared import directions
from shared.adapter import Adapter
from shared.codec import encode_manifest
from shared.messages import Block, Commit, LocalSteps, Manifest, PoolSums, Tuning, Variant
from tests.support.facts import round_opened

D, EPS, ROWS = 200, 1e-5, 100
MOVE = 0.01 * np.random.default_rng(0).standard_normal(D)


def adapter_after(rounds: list[NDArray[np.float64]], pool: int, **tuning: float) -> Adapter:
    """Where the fleet stands after these moves, each told by its products with a round's pool."""
    blocks = [Block("control", "blk.1", [D], layer=1)]
    variants = [Variant("a" * 64, 1, "tiny.gguf")]
    manifest = Manifest(0, "llama", 7, blocks, variants, D, update_rule="momentum")
    adapter = Adapter(encode_manifest(manifest))
    numbers = msgspec.convert(
        {"how": "exact", "normalise": "none", "local_steps": 4} | tuning, Tuning
    )
    for number, move in enumerate(rounds, 1):
        products = directions.dots(7, number, [(0, pool)], move, 0, "signs")
        sums = Pool(pool)
        told = np.rint(-2 * EPS * ROWS * products * 2**20).astype("<i8").tobytes()
        weights = np.full(pool, ROWS, "<i8").tobytes()
        sums.add(PoolSums((0, pool), 0, told, b"", weights))
        opened = round_opened(
            number, directions=pool, eps=EPS, how="exact", local=LocalSteps(4, 64, 0.01)
        )
        closing = Seedwire().close([RoundSums(opened, sums)], numbers, adapter)
        adapter.apply(number, Commit(int(numbers.momentum), closing.terms))
    return adapter


def test_of_few_directions_so_much_is_believed_as_is_nearest_to_the_move() -> None:
    found = adapter_after([MOVE], 64, step=1.0, momentum=64).values()
    share = 64 / (64 + D - 1)
    assert found @ MOVE / (MOVE @ MOVE) == pytest.approx(share, rel=0.25)
    nearest = np.linalg.norm(found - MOVE)
    for other in (0.5, 2.0):
        assert nearest < np.linalg.norm(other * found - MOVE)


@pytest.mark.parametrize("step", [1.0, 1.5, 4.0])
def test_however_many_directions_momentum_ends_at_the_whole_move_and_no_further(
    step: float,
) -> None:
    rounds = [MOVE, *[np.zeros(D)] * 20]
    found = adapter_after(rounds, 4096, step=step, momentum=128).values()
    assert np.linalg.norm(found - MOVE) < 0.3 * np.linalg.norm(MOVE)
    assert found @ MOVE / (MOVE @ MOVE) == pytest.approx(1.0, abs=0.1)
