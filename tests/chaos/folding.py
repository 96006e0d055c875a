"""What the log must say, worked out again: DESIGN's arithmetic in plain Python and numpy.

Imports nothing of what it judges. Updates are the bytes that devices wrote to their disks.
"""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

Fields = dict[str, Any]
Coefficients = dict[tuple[int, int], int]
"""(stream round, direction) -> coefficient in 2^-24."""

QUANTUM, UNIT, MOST = 2.0**-20, 2.0**-24, 2**22


def unpacked(data: bytes) -> Fields:
    return msgpack.unpackb(data, strict_map_key=False)


def indices(ranges: list[list[int]]) -> list[int]:
    return [j for first, count in ranges for j in range(first, first + count)]


def integers(data: bytes, width: int) -> list[int]:
    return np.frombuffer(data, f"<i{width}").tolist()


@dataclass
class Round:
    """One round as it was opened, and what was counted into it."""

    opened: Fields
    differences: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    weights: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    late: Coefficients = field(default_factory=lambda: defaultdict(int))
    probes: int = 0
    late_weight: int = 0
    frozen: tuple[float, float, float] | None = None
    """(step, clip, normaliser) of its own close."""
    closed: Fields | None = None
    reports: int = 0


def slope(difference: int, eps: float, weight: int) -> float:
    return difference * (QUANTUM / (2 * eps)) / weight


def coefficient(rho: float, weight: int, step: float, clip: float, mean: float) -> int:
    held = max(-clip, min(clip, rho))
    return max(-MOST, min(MOST, round(held * weight * (-step / (mean * UNIT)))))


def own_term(one: Round, tuning: Fields) -> Coefficients:
    """The coefficients of a round's own pool, and what its close fixes for latecomers."""
    opened, eps = one.opened, one.opened["eps"]
    weights = {j: w for j, w in one.weights.items() if w > 0}
    slopes = {j: slope(one.differences[j], eps, w) for j, w in weights.items()}
    mean = float(sum(weights.values()))
    spread = math.sqrt(sum(slopes[j] ** 2 * w for j, w in weights.items()) / mean)
    share = min(1.0, opened["commits"] / max(1, tuning["rounds"] - 1))
    step = tuning["step"] * (1 + (tuning["final_step"] - 1) * share)
    if tuning["normalise"] == "rms":
        step = step / spread if spread > 0 else 0.0
    clip = tuning["clip"] * spread
    one.frozen = (step, clip, mean)
    number = opened["stream_round"]
    return {(number, j): coefficient(slopes[j], w, step, clip, mean) for j, w in weights.items()}


def late_term(one: Round, result: Fields, rounds_late: int) -> Coefficients:
    """What an update adds that comes `rounds_late` after its round."""
    directions = indices(result["ranges"])
    numbers = integers(result["differences"], 4)
    weight: int = result["weight"]
    one.late_weight += len(directions) * weight
    if one.frozen is None:
        return {}
    step, clip, mean = one.frozen
    found: Coefficients = defaultdict(int)
    for j, number in zip(directions, numbers, strict=True):
        rho = slope(number, one.opened["eps"], weight)
        lent = step / (1 + rounds_late)
        value = coefficient(rho, weight, lent, clip, mean + one.late_weight)
        found[one.opened["stream_round"], j] += value
    return found


@lru_cache(maxsize=4096)
def _signs(seed: int, stream_round: int, group: int, d: int) -> NDArray[np.int64]:
    """(8, d): the directions 8 group ... 8 group + 7."""
    key = np.array([seed, (stream_round << 32) | group], np.uint64)
    raw = np.random.Philox(key=key).random_raw(-(-d // 8)).astype("<u8").tobytes()[:d]
    lanes = np.frombuffer(raw, np.uint8)
    return np.array([2 * ((lanes >> b) & 1).astype(np.int64) - 1 for b in range(8)])


class Theta:
    """The adapter, by commits alone."""

    def __init__(self, manifest: bytes, start: bytes = b"") -> None:
        """At zero, or where the snapshot `start` is."""
        fields = unpacked(manifest)
        self.manifest = manifest
        self._manifest_digest = hashlib.sha256(manifest).digest()
        self._seed: int = fields["seed"]
        self.epoch: int = fields["epoch"]
        self._momentum = fields["update_rule"] == "momentum"
        counts = [int(np.prod(block["shape"])) for block in fields["blocks"]]
        scales = [block.get("scale", 0) for block in fields["blocks"]]
        self._scales = np.repeat(np.array(scales, np.int64), counts)
        self.d = sum(counts)
        self.round = 0
        self.theta = np.zeros(self.d, np.int64)
        self.velocity = np.zeros(self.d, np.int64)
        if start:
            snapshot = unpacked(start)
            self.round = snapshot["round"]
            self.theta = np.frombuffer(snapshot["theta"], "<i4").astype(np.int64)

    def close(self, number: int, commit: Fields | None) -> None:
        if commit is not None:
            step = np.zeros(self.d, np.int64)
            for (stream_round, j), value in of_commit(commit).items():
                step += value * _signs(self._seed, stream_round, j // 8, self.d)[j % 8]
            if self._momentum:
                step = self.velocity = ((commit["momentum"] * self.velocity) >> 8) + step
            self.theta = self.theta + (step << self._scales)
        self.round = number

    def digest(self) -> str:
        sha = hashlib.sha256(b"seedwire1" + self._manifest_digest)
        sha.update(self.epoch.to_bytes(4, "little") + self.round.to_bytes(4, "little"))
        sha.update(self.theta.astype("<i4").tobytes())
        if self._momentum:
            sha.update(self.velocity.astype("<i8").tobytes())
        return sha.hexdigest()


def of_commit(commit: Fields) -> Coefficients:
    return of_terms(commit["terms"])


def of_terms(terms: list[Fields]) -> Coefficients:
    found: Coefficients = defaultdict(int)
    for term in terms:
        values = integers(term["coefficients"], 4)
        for j, value in zip(indices(term["ranges"]), values, strict=True):
            found[term["stream_round"], j] += value
    return found


def differ(a: Coefficients, b: Coefficients, *, by: int = 0) -> str:
    """Where two sets of coefficients differ by more than `by`; empty: nowhere."""
    for key in sorted({*a, *b}):
        if abs(a.get(key, 0) - b.get(key, 0)) > by:
            return f"direction {key}: {a.get(key, 0)} in the log, {b.get(key, 0)} by the witness"
    return ""
