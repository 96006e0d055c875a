"""Directions are the same bytes everywhere, and sums over them are exact."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import directions
from shared.messages.jobs import Distribution

ranges = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=4)


def philox4x64(key: tuple[int, int], counter: int) -> list[int]:
    """One block of Philox4x64-10, from the paper's algorithm, without numpy."""
    mask, (k0, k1) = 2**64 - 1, key
    words = [counter, 0, 0, 0]
    for _ in range(10):
        high0, low0 = divmod(words[0] * 0xD2E7470EE14C6C93, 2**64)
        high1, low1 = divmod(words[2] * 0xCA5A826395121157, 2**64)
        words = [high1 ^ words[1] ^ k0, low1, high0 ^ words[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


def test_the_generator_is_philox_with_the_designs_key() -> None:
    found = directions.group_bytes(1, 2, 3, 0, 96).tobytes()
    assert found[:8].hex() == "7e6310b63996a7be"
    blocks = [philox4x64((1, 2 << 32 | 3), counter) for counter in (1, 2, 3)]
    assert found == b"".join(word.to_bytes(8, "little") for block in blocks for word in block)


def test_gauss8_is_a_pinned_table() -> None:
    table = directions.GAUSS8
    assert table[[0, 1, 127, 128, 255]].tolist() == [-11820, -10324, -20, 20, 11820]
    assert hashlib.sha256(table.astype("<i2").tobytes()).hexdigest()[:16] == "1eebb6c1d261b9d1"


def test_bit_b_of_group_g_is_direction_8g_plus_b() -> None:
    packed = directions.group_bytes(5, 9, 2, 0, 100)
    for bit in range(8):
        signs = directions.one(5, 9, 16 + bit, 0, 100, "signs")
        assert (signs == np.where(packed >> bit & 1, 1, -1)).all()


@given(start=st.integers(0, 200), count=st.integers(1, 300))
def test_a_scope_sees_the_same_parameters_as_the_whole(start: int, count: int) -> None:
    whole = directions.group_bytes(1, 2, 3, 0, 500)
    assert (directions.group_bytes(1, 2, 3, start, count) == whole[start : start + count]).all()


@pytest.mark.parametrize("distribution", ["signs", "gauss8"])
@given(chosen=ranges, start=st.integers(0, 70), seed=st.integers(0, 2**63 - 1))
def test_a_total_is_the_sum_of_its_directions(
    distribution: Distribution, chosen: list[tuple[int, int]], start: int, seed: int
) -> None:
    indices = [i for first, count in chosen for i in range(first, first + count)]
    values = np.random.default_rng(seed % 1000).integers(-(2**22), 2**22, len(indices))
    found = directions.total(seed, 7, chosen, values.astype(np.int32), start, 50, distribution)
    exact = sum(
        int(value) * (directions.one(seed, 7, i, start, 50, distribution).astype(np.float64) * 4096)
        for i, value in zip(indices, values, strict=True)
    )
    assert (found == np.floor(np.asarray(exact) / 4096)).all()


def test_a_total_whose_tables_leave_int32_is_still_exact() -> None:
    biggest = np.full(8, 2**31 - 1, np.int32)
    found = directions.total(3, 1, [(0, 8)], biggest, 0, 1000, "signs")
    exact = sum(
        (2**31 - 1) * directions.one(3, 1, j, 0, 1000, "signs").astype(np.int64) for j in range(8)
    )
    assert (found == exact).all()


@pytest.mark.parametrize("distribution", ["signs", "gauss8"])
@given(chosen=ranges)
def test_dots_are_inner_products_with_each_direction(
    distribution: Distribution, chosen: list[tuple[int, int]]
) -> None:
    vector = np.random.default_rng(1).normal(size=60)
    indices = [i for first, count in chosen for i in range(first, first + count)]
    exact = [vector @ directions.one(4, 2, i, 10, 60, distribution) for i in indices]
    assert np.allclose(directions.dots(4, 2, chosen, vector, 10, distribution), exact)


def test_the_fixed_a_lies_in_its_reserved_round() -> None:
    packed = directions.group_bytes(11, directions.A_ROUND, 2, 0, 64)
    assert (directions.lora_a(11, 2, 0, 64) == np.where(packed & 1, 1, -1)).all()
    assert (directions.lora_a(11, 2, 32, 8) == directions.lora_a(11, 2, 0, 64)[32:40]).all()


def test_each_epoch_and_each_seed_has_an_a_of_its_own() -> None:
    first = directions.lora_a(7, 0, 0, 64)
    assert (directions.lora_a(7, 1, 0, 64) != first).any()
    assert (directions.lora_a(2**62, 0, 0, 64) != directions.lora_a(2**62 + 1, 0, 0, 64)).any()
