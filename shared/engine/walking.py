"""A device's walk: local steps from the adapter, each along one direction drawn from the pool.

Source: Qin et al., FedKSeed (ICML 2024), the client's loop: draw a seed, one two-point estimate on
a mini-batch, one step, and the slope is added to the seed's sum; steps whose loss is not finite are
skipped.
Differs in: draws and batches follow from a key, so that a walk can be repeated; a slope is rounded
to what is reported before the step is taken, so that server and device move by the same numbers.
"""

import numpy as np

from shared import directions
from shared.engine.drawing import draws, generator, mini_batches
from shared.engine.job import Job, Rows
from shared.engine.probing import NAT
from shared.engine.protocol import Walk
from shared.errors import EngineError
from shared.messages import WalkResult
from shared.ranges import runs

MAX_SHARE = 2**20
_INT32_MAX = 2**31 - 1


def walk(job: Job, request: Walk) -> WalkResult:
    """Sums over the walk by direction; the adapter stays where it is.

    Raises:
        EngineError: no data, another adapter, or not one step could be taken.
    """
    job.require(request.digest)
    held = job.rows_of(request.round)
    drawing = generator(job, request.round, request.part, "directions")
    drawn = draws(drawing, request.directions, request.walk.weights, request.walk.steps)
    batches = mini_batches(
        generator(job, request.round, request.part, "rows"), len(held), request.batch_rows
    )
    steps = _Steps(job, request)
    for index in drawn.tolist():
        steps.take(index, [held[number] for number in next(batches)])
    if not steps.taken:
        raise EngineError(
            "no step of the walk had a finite loss; the adapter has diverged: lower the job's step"
        )
    return steps.result(min(len(held), MAX_SHARE))


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
            ranges=runs(visited),
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


def _packed(values: dict[int, int], visited: list[int], dtype: str) -> bytes:
    return np.array([values[index] for index in visited], dtype).tobytes()
