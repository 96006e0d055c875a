"""What chance decides on a device, as a function of job, device and round, so that it repeats."""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shared.engine.job import Job
from shared.errors import EngineError


def generator(job: Job, round: int, part: int, what: str) -> np.random.Philox:
    """Chance for `what` of a device's part of a round.

    Keyed by "seedwire walk ", `what`, a zero byte, seed u64le, round and part u32le, and device.
    """
    seed = job.adapter.manifest.seed
    numbers = seed.to_bytes(8, "little") + round.to_bytes(4, "little")
    numbers += part.to_bytes(4, "little")
    material = b"seedwire walk " + what.encode() + b"\0" + numbers
    return _keyed(material + job.request.device.encode())


def batch(seed: int, round: int, device: str, rows: int, batch_rows: int) -> list[int]:
    """The rows that `device` measures in `round`: min(rows, batch_rows) of [0, rows), ascending.

    A pure function, so that every part of a round's work repeats it: the rows with the smallest of
    the first `rows` words of Philox4x64-10, its key the first 16 bytes (two little-endian words) of
    SHA-256("seedwire batch", seed u64le, round u32le, device).
    """
    if rows <= batch_rows:
        return list(range(rows))
    material = b"seedwire batch" + seed.to_bytes(8, "little") + round.to_bytes(4, "little")
    words = _keyed(material + device.encode()).random_raw(rows)
    chosen = np.argsort(words, kind="stable")[:batch_rows]
    return np.sort(chosen).tolist()


def draws(
    generator: np.random.Philox, directions: int, weights: bytes, steps: int
) -> NDArray[np.int64]:
    """The directions of a walk's steps: (steps,) int64 in [0, directions).

    Direction k comes with probability weights[k] / sum(weights), <u2; without weights, all alike:
    the first whose weights up to it sum to more than word % sum(weights).

    Raises:
        EngineError: there are not as many weights as directions, or all are 0.
    """
    likely = np.frombuffer(weights, "<u2") if weights else np.ones(directions, np.uint16)
    upto = np.cumsum(likely, dtype=np.uint64)
    if len(likely) != directions or not directions or not upto[-1]:
        raise EngineError(f"{len(likely)} weights for a pool of {directions} directions")
    words = generator.random_raw(steps) % upto[-1]
    return np.searchsorted(upto, words, side="right").astype(np.int64)


def mini_batches(
    generator: np.random.Philox, rows: int, batch_rows: int
) -> Iterator[NDArray[np.intp]]:
    """Batches of min(rows, batch_rows) of [0, rows), ascending: all rows in turn, shuffled anew.

    Rows that are left when there are too few for a batch are passed over.
    """
    size = min(rows, batch_rows)
    while True:
        shuffled = np.argsort(generator.random_raw(rows), kind="stable")
        for low in range(0, rows - size + 1, size):
            yield np.sort(shuffled[low : low + size])


def _keyed(material: bytes) -> np.random.Philox:
    """Philox4x64-10; its key is the first 16 bytes, two little-endian words, of the SHA-256."""
    key = np.frombuffer(hashlib.sha256(material).digest()[:16], "<u8")
    return np.random.Philox(key=key.astype(np.uint64))
