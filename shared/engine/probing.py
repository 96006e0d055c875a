"""A device's slopes along directions: two forward passes each, or none where a form is closed.

Source: Malladi et al., MeZO, algorithm 1 (two-point SPSA); Chaubard et al. (2026), 1.5-SPSA, for
the bend from one clean pass.
Differs in: loss differences leave as integers of 2^-20 nat, so that pooling is exact; for a scope
of blocks in closed form, `exact` sends what the differences tend to, 2 eps <gradient, z>, from one
pass, or with local steps the same of the device's own move.
"""

import numpy as np
from numpy.typing import NDArray

from shared import directions
from shared.dataset import Row, Turn
from shared.engine.descending import descended
from shared.engine.drawing import batch
from shared.engine.job import Job
from shared.engine.model import Losses
from shared.engine.protocol import Probe
from shared.errors import EngineError
from shared.messages import ProbeResult, Range
from shared.ranges import indices

NAT = 2.0**20
"""Loss integers per nat."""

_INT32_MAX = 2.0**31 - 1


def probe(job: Job, request: Probe) -> ProbeResult:
    """Slopes of the device's batch of the round along `request.ranges`.

    Raises:
        EngineError: no data, another adapter, a scope that `how` cannot serve, or a base loss that
            is not finite.
    """
    job.require(request.digest)
    number = request.batch_round or request.round
    held = job.rows_of(number)
    seed, device = job.adapter.manifest.seed, job.request.device
    drawn = batch(seed, number, device, len(held), request.batch_rows)
    rows = [held[number] for number in drawn]
    if request.how == "exact":
        base, differences = _exact(job, request, rows)
        kept = _fits(differences)
        if request.local is not None and not kept.all():
            raise EngineError("a move does not fit int32: lower the job's eps, or batch_rows")
        bends = np.empty(0)
    else:
        base, differences, bends = _probe(job, request, rows)
        kept = _fits(differences) & _fits(bends)
        bends = bends[kept]
    return ProbeResult(
        how=request.how,
        ranges=kept_ranges(request.ranges, kept),
        differences=_packed(differences[kept]),
        bends=_packed(bends),
        loss=round(float(base.loss.sum()) * NAT),
        weight=int(base.weight.sum()),
        dropped=int((~kept).sum()),
    )


def kept_ranges(ranges: list[Range], kept: NDArray[np.bool_]) -> list[Range]:
    """`ranges` without the directions that are not `kept` (n,): split where one is missing."""
    if kept.all():
        return list(ranges)
    indices = np.concatenate([np.arange(first, first + count) for first, count in ranges])
    fresh = np.concatenate([np.arange(count) == 0 for _, count in ranges])
    split: list[Range] = []
    previous_kept = False
    for index, starts, keep in zip(indices.tolist(), fresh.tolist(), kept.tolist(), strict=True):
        if keep and previous_kept and not starts:
            first, count = split[-1]
            split[-1] = (first, count + 1)
        elif keep:
            split.append((index, 1))
        previous_kept = keep
    return split


def _probe(
    job: Job, request: Probe, rows: list[Row | Turn]
) -> tuple[Losses, NDArray[np.float64], NDArray[np.float64]]:
    """Base losses, and S+ - S- and S+ + S- - 2 S0 in 2^-20 nat, (n,) float64 each."""
    start, count = job.layout.span(request.scope)
    manifest = job.adapter.manifest
    examples = job.examples(rows)
    base = _finite(job.base_losses(rows, examples))
    theta = job.adapter.values()
    reach = job.layout.magnitudes[start : start + count] * np.float32(request.eps)
    measured = list(indices(request.ranges))
    differences = np.zeros(len(measured))
    bends = np.zeros(len(measured))
    for part in job.model.parts(examples):
        chosen, clean = examples[part], base.loss[part]
        for number, index in enumerate(measured):
            z = directions.one(
                manifest.seed, request.stream_round, index, start, count, manifest.distribution
            )
            moved = theta.copy()
            moved[start : start + count] += reach * z
            job.model.stand(moved)
            above = job.model.measure(chosen).loss
            moved[start : start + count] = theta[start : start + count] - reach * z
            job.model.stand(moved)
            below = job.model.measure(chosen).loss
            differences[number] += (above - below).sum()
            bends[number] += (above + below - 2.0 * clean).sum()
    return base, differences * NAT, bends * NAT


def _exact(job: Job, request: Probe, rows: list[Row | Turn]) -> tuple[Losses, NDArray[np.float64]]:
    """Base losses, and 2 eps <gradient, z_j> in 2^-20 nat, (n,) float64.

    With local steps, what the device would move by stands for the gradient: their sum, times the
    weight that the aggregator divides by.
    """
    manifest = job.adapter.manifest
    start, count = job.layout.span(request.scope)
    first, blocks = request.scope
    closed = job.closed
    if closed is None:
        raise EngineError(f"how: exact needs a closed form: {job.no_closed_form}")
    if not set(range(first, first + blocks)) <= set(closed.numbers):
        raise EngineError("how: exact needs a scope of blocks in closed form alone; use how: probe")
    if request.local is None:
        base, gradient = job.gradient(closed, rows)
    else:
        sites = job.sites(closed, rows)
        base = closed.losses(sites, job.adapter.values())
        moved = descended(job, closed, request, request.local, sites)
        gradient = -moved * int(base.weight.sum())
    _finite(base)
    slopes = gradient[start : start + count]
    if request.local is None:
        slopes = slopes * job.layout.magnitudes[start : start + count]
    else:
        slopes = slopes / job.layout.magnitudes[start : start + count]
    products = directions.dots(
        manifest.seed, request.stream_round, request.ranges, slopes, start, manifest.distribution
    )
    return base, products * (2.0 * request.eps * NAT)


def _finite(losses: Losses) -> Losses:
    if not np.isfinite(losses.loss).all():
        raise EngineError(
            "the loss at theta is not finite; the adapter has diverged: lower the job's step"
        )
    return losses


def _fits(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of `values` (n,) are numbers that int32 holds."""
    return np.abs(np.nan_to_num(values, nan=np.inf)) <= _INT32_MAX


def _packed(values: NDArray[np.float64]) -> bytes:
    return np.rint(values).astype("<i4").tobytes()
