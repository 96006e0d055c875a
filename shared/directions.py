"""The directions of a round: never sent, made alike everywhere from a seed.

Bits of Philox4x64-10 with key (job seed, round << 32 | group), as numpy's
`Philox(key=...).random_raw()` from its first block, 64-bit words little-endian. Byte i of group g
belongs to parameter i. `signs`: its bit b is direction 8g + b, 1 meaning +1. `gauss8`: group g is
direction g, and the byte looks up a quantile of the normal distribution in units of 1/4096.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), for Philox;
Malladi et al., MeZO (2023), for directions as seeds.
Differs in: eight Rademacher directions share one byte a parameter, so that a sum over all of a pool
is one 256-entry table look-up per group and parameter.
"""

from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from shared.messages.jobs import Distribution
from shared.ranges import indices, width

A_ROUND = 2**32 - 1
"""The stream round that is reserved for the fixed A of LoRA blocks."""

GAUSS_UNIT = 4096
_BLOCK_BYTES = 32
_CHUNK = 1 << 15
_INT32_MAX = 2**31 - 1

_SIGNS = (2 * ((np.arange(256)[:, None] >> np.arange(8)[None, :]) & 1) - 1).astype(np.int32)
"""(256, 8) int32: the eight signs in a byte."""

GAUSS8: NDArray[np.int16] = np.array(
    [round(GAUSS_UNIT * NormalDist().inv_cdf((b + 0.5) / 256)) for b in range(256)], np.int16
)
"""(256,) int16: round(4096 * inverse normal of (b + 1/2) / 256)."""

Ranges = Sequence[tuple[int, int]]


def group_bytes(seed: int, round: int, group: int, start: int, count: int) -> NDArray[np.uint8]:
    """Bytes of one group for parameters [start, start + count): (count,) uint8."""
    block, skip = divmod(start, _BLOCK_BYTES)
    return _bytes(_generator(seed, round, group, block), skip + count)[skip:]


def one(
    seed: int, round: int, index: int, start: int, count: int, distribution: Distribution
) -> NDArray[np.float32]:
    """Entries of one direction for parameters [start, start + count): (count,) float32."""
    if distribution == "gauss8":
        entries = GAUSS8[group_bytes(seed, round, index, start, count)]
        return entries.astype(np.float32) / np.float32(GAUSS_UNIT)
    group, bit = divmod(index, 8)
    bits = (group_bytes(seed, round, group, start, count) >> np.uint8(bit)) & np.uint8(1)
    return bits.astype(np.float32) * np.float32(2) - np.float32(1)


def total(
    seed: int,
    round: int,
    ranges: Ranges,
    coefficients: NDArray[np.int32],
    start: int,
    count: int,
    distribution: Distribution,
) -> NDArray[np.int64]:
    """sum_j c_j z_j over `ranges` for parameters [start, start + count): (count,) int64.

    `coefficients` (n,) int32, in the order of `ranges`. Exact: integers only; for `gauss8` the
    sum of c_j times the table's entry is shifted right by 12, once.
    """
    block, skip = divmod(start, _BLOCK_BYTES)
    sums = np.zeros(skip + count, np.int64)
    groups = [
        (_generator(seed, round, group, block), table)
        for group, table in _tables(ranges, coefficients, distribution)
    ]
    # Chunk by chunk over all groups, so that the running sums stay in the cache.
    indices = np.empty(_CHUNK, np.intp)
    for low in range(0, len(sums), _CHUNK):
        chunk = sums[low : low + _CHUNK]
        _add_chunk(chunk, groups, indices[: len(chunk)])
    sums = sums[skip:]
    if distribution == "gauss8":
        sums >>= 12
    return sums


def dots(
    seed: int,
    round: int,
    ranges: Ranges,
    vector: NDArray[np.float64],
    start: int,
    distribution: Distribution,
) -> NDArray[np.float64]:
    """<vector, z_j> for every direction of `ranges`, in order: (n,) float64.

    `vector` (count,) float64 belongs to parameters [start, start + count).
    """
    found: dict[int, NDArray[np.float64]] = {}
    products: list[float] = []
    per_group = 1 if distribution == "gauss8" else 8
    for index in indices(ranges):
        group, bit = divmod(index, per_group)
        if group not in found:
            packed = group_bytes(seed, round, group, start, len(vector))
            mass = np.bincount(packed, weights=vector, minlength=256)
            table = GAUSS8[:, None] / GAUSS_UNIT if distribution == "gauss8" else _SIGNS
            found = {group: np.asarray(mass @ table, np.float64)}
        products.append(float(found[group][bit]))
    return np.array(products, np.float64)


def lengths(
    seed: int,
    round: int,
    ranges: Ranges,
    start: int,
    count: int,
    distribution: Distribution,
) -> NDArray[np.float64]:
    """|z_j| over parameters [start, start + count) of every direction of `ranges`: (n,) float64."""
    if distribution == "signs":
        return np.full(width(ranges), np.sqrt(count))
    squares = np.square(GAUSS8 / GAUSS_UNIT)
    drawn = (group_bytes(seed, round, index, start, count) for index in indices(ranges))
    found = [float(np.bincount(packed, minlength=256) @ squares) for packed in drawn]
    return np.sqrt(np.array(found, np.float64))


def lora_a(seed: int, epoch: int, first_entry: int, count: int) -> NDArray[np.int8]:
    """Signs of the fixed A's entries [first_entry, first_entry + count): (count,) int8, +-1.

    Entries run through the manifest's LoRA blocks in order, row-major; bit 0 of byte i is entry i
    of group = epoch. The magnitude 1 / sqrt(d_in) is the caller's.
    """
    bits = group_bytes(seed, A_ROUND, epoch, first_entry, count) & np.uint8(1)
    return (bits.astype(np.int8) * 2 - 1).astype(np.int8)


def _generator(seed: int, round: int, group: int, block: int) -> np.random.Philox:
    # A list would pass through float64 and lose a large key's low bits.
    key = np.array([seed, (round << 32) | group], np.uint64)
    generator = np.random.Philox(key=key)
    if block:
        generator.advance(block)
    return generator


def _bytes(generator: np.random.Philox, count: int) -> NDArray[np.uint8]:
    words = generator.random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def _add_chunk(
    chunk: NDArray[np.int64],
    groups: Sequence[tuple[np.random.Philox, NDArray[np.int64]]],
    indices: NDArray[np.intp],
) -> None:
    """Add every group's next bytes, looked up in its table, to `chunk` (n,) int64."""
    running = np.zeros(len(chunk), np.int32)
    looked_up = np.empty(len(chunk), np.int32)
    room = _INT32_MAX
    for generator, table in groups:
        largest = int(np.abs(table).max())
        if largest > _INT32_MAX:
            chunk += table[_bytes(generator, len(chunk))]
            continue
        if largest > room:
            chunk += running
            running[:] = 0
            room = _INT32_MAX
        room -= largest
        indices[:] = _bytes(generator, len(chunk))
        np.take(table.astype(np.int32), indices, out=looked_up, mode="clip")
        running += looked_up
    chunk += running


def _tables(
    ranges: Ranges, coefficients: NDArray[np.int32], distribution: Distribution
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """A 256-entry table of partial sums for each group that `ranges` touches."""
    if distribution == "gauss8":
        for index, coefficient in zip(indices(ranges), coefficients.tolist(), strict=True):
            if coefficient:
                yield index, GAUSS8.astype(np.int64) * coefficient
        return
    groups: dict[int, NDArray[np.int64]] = {}
    for index, coefficient in zip(indices(ranges), coefficients.tolist(), strict=True):
        groups.setdefault(index >> 3, np.zeros(8, np.int64))[index & 7] += coefficient
    for group, weights in groups.items():
        if weights.any():
            yield group, _SIGNS.astype(np.int64) @ weights
