"""A device's walk: local steps from the adapter, each along one direction drawn from the pool.

Source: Qin et al., FedKSeed (ICML 2024), the client's loop: draw a seed, one two-point estimate on
a mini-batch, one step, and the slope is added to the seed's sum; steps whose loss is not finite are
skipped.
Differs in: draws and batches follow from a key, so that a walk can be repeated; a slope is rounded
to what is reported before the step is taken, so that server and device move by the same numbers.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shared import directions
from shared.engine.job import Job, Rows
from shared.engine.probing import NAT
from shared.engine.protocol import Walk
from shared.errors import EngineError
from shared.messages import WalkResult

MAX_SHARE = 2**20
_INT32_MAX = 2**31 - 1


def walk(job: Job, request: Walk) -> WalkResult:
    """Sums over the walk by direction; the adapter stays where it is.

    Raises:
        EngineError: no data, another adapter, or not one step could be taken.
    """
    job.require(request.digest)
    held = job.rows_of(request.round)
    drawing = _generator(job, request, "directions")
    drawn = draws(drawing, request.directions, request.walk.weights, request.walk.steps)
    batches = mini_batches(_generator(job, request, "rows"), len(held), request.batch_rows)
    steps = _Steps(job, request)
    for index in drawn.tolist():
        steps.take(index, [held[number] for number in next(batches)])
    if not steps.taken:
        raise EngineError(
            "no step of the walk had a finite loss; the adapter has diverged: lower the job's step"
        )
    return steps.result(min(len(held), MAX_SHARE))


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


class _Steps:
    """Where the walk is, and what it has met."""

    def __init__(self, job: Job, request: Walk) -> None:
        self.taken = 0
        self._job = job
        self._request = request
        self._start, self._count = job.layout.span(request.scope)
        self._span = slice(self._start, self._start + self._count)
        self._magnitudes = job.layout.magnitudes[self._span]
        self._theta = job.adapter.values()
        self._place = self._theta[self._span].astype(np.float64)
        self._differences: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._visits: dict[int, int] = {}
        self._dropped = 0
        self._loss = 0.0
        self._weight = 0

    def take(self, index: int, rows: Rows) -> None:
        """Measure along direction `index` on `rows`, and step; or pass it over."""
        request, manifest = self._request, self._job.adapter.manifest
        z = directions.one(
            manifest.seed,
            request.stream_round,
            index,
            self._start,
            self._count,
            manifest.distribution,
        )
        way = (self._magnitudes * z).astype(np.float64)
        examples = self._job.examples(rows)
        losses: list[float] = []
        weight = 0
        for sign in (1.0, -1.0):
            with np.errstate(over="ignore"):  # a walk that diverges says so by its loss
                self._theta[self._span] = self._place + sign * request.eps * way
            self._job.model.stand(self._theta)
            measured = self._job.model.measure(examples)
            losses.append(float(measured.loss.sum()))
            weight = int(measured.weight.sum())
        above, below = losses
        difference = (above - below) / max(1, weight) * NAT
        before = self._differences.get(index, 0)
        if not (np.isfinite(above + below) and abs(before + difference) < _INT32_MAX):
            self._dropped += 1
            return
        self._count_step(index, round(difference), (above + below) / 2, weight)
        slope = round(difference) / NAT / (2 * request.eps)
        self._place -= request.walk.step * slope * way

    def result(self, share: int) -> WalkResult:
        visited = sorted(self._visits)
        sized = self._request.walk.held > 0
        return WalkResult(
            ranges=_runs(visited),
            differences=_packed(self._differences, visited, "<i4"),
            share=share,
            steps=self.taken,
            loss=round(self._loss * NAT),
            weight=self._weight,
            sizes=_packed(self._sizes, visited, "<i8") if sized else b"",
            visits=_packed(self._visits, visited, "<u2") if sized else b"",
            dropped=self._dropped,
        )

    def _count_step(self, index: int, difference: int, loss: float, weight: int) -> None:
        largest = round(self._request.walk.held * 2 * self._request.eps * NAT)
        self.taken += 1
        self._differences[index] = self._differences.get(index, 0) + difference
        self._sizes[index] = self._sizes.get(index, 0) + min(abs(difference), largest)
        self._visits[index] = self._visits.get(index, 0) + 1
        self._loss += loss
        self._weight += weight


def _generator(job: Job, request: Walk, what: str) -> np.random.Philox:
    """Philox4x64-10 whose key is the first 16 bytes of a SHA-256 of what names the walk."""
    seed = job.adapter.manifest.seed
    numbers = seed.to_bytes(8, "little") + request.round.to_bytes(4, "little")
    part = request.part.to_bytes(4, "little")
    material = b"seedwire walk " + what.encode() + b"\0" + numbers + part
    digest = hashlib.sha256(material + job.request.device.encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8").astype(np.uint64))


def _packed(values: dict[int, int], visited: list[int], dtype: str) -> bytes:
    return np.array([values[index] for index in visited], dtype).tobytes()


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Ascending indices as runs (first, count)."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs
