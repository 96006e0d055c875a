"""The job that waits: its last version as the log and the store have it, and its next epoch."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared import blobs, log, subjects
from shared.adapter import Adapter, next_epoch
from shared.bus import Link
from shared.codec import decode_answer, encode, encode_manifest
from shared.errors import RejectError
from shared.heldout import HeldOut
from shared.messages import (
    BlobRef,
    Distilled,
    EpochOpened,
    JobAccepted,
    JobEnded,
    JobOpened,
    JobSpec,
    LogEvent,
    ModelPublished,
    OpenEpoch,
    RoundClosed,
    RoundOpened,
)

ANSWER_S = 60.0


@dataclass(frozen=True)
class Waiting:
    """A job between two epochs."""

    job: str
    spec: JobSpec
    adapter: Adapter
    """The published one that did best on held-out rows, or else the last."""
    anchor: NDArray[np.float32]
    """(d,): what stands for the base model in the present ensemble; zeros: itself."""
    round: int
    """The last that was closed."""


async def waiting(link: Link, job: str) -> Waiting:
    """The job `job`, which waits for its next epoch.

    Raises:
        RejectError: it does not; says why.
        TransientError: the broker does not answer, or a blob is not in the store.
    """
    spec: JobSpec | None = None
    epoch: EpochOpened | None = None
    published: ModelPublished | None = None
    closed, is_open, ended = 0, False, False
    held_out = HeldOut()
    async with aclosing(log.read(link, subjects.LOG_STREAM, subjects.log(job))) as events:
        async for _, event in events:
            if isinstance(event, LogEvent):
                held_out.see(event)
            match event:
                case JobOpened():
                    spec = event.spec
                case EpochOpened():
                    epoch, published = event, None
                case RoundOpened():
                    is_open = True
                case RoundClosed():
                    closed, is_open = event.round, False
                case ModelPublished():
                    published = event
                case JobEnded():
                    ended = True
                case _:
                    pass
    if spec is None or epoch is None:
        raise RejectError(f"no job is called {job}; `seedwire job list` names them")
    if ended or epoch.epoch + 1 >= spec.epochs:
        why = "has ended" if ended else f"is in the last of its {spec.epochs} epochs"
        raise RejectError(f"job {job} {why}; submit one with --epochs 2 or more")
    if is_open or published is None or published.round != closed:
        raise RejectError(
            f"the rounds of epoch {epoch.epoch + 1} of job {job} are not done; try again when "
            "`seedwire job list` says that it waits"
        )
    adapter = await _adapter(link, epoch, [*held_out.ranked(), published])
    anchor = np.zeros(adapter.layout.d, np.float32)
    if epoch.anchor is not None:
        data = await blobs.load(link, epoch.anchor)
        anchor = Adapter.from_bytes(epoch.manifest, data).values()
    return Waiting(job, spec, adapter, anchor, closed)


async def _adapter(link: Link, epoch: EpochOpened, preferred: Sequence[ModelPublished]) -> Adapter:
    """The first of the `preferred` that the store has."""
    *others, last = preferred
    for one in others:
        try:
            return Adapter.from_bytes(epoch.manifest, await blobs.load(link, one.snapshot))
        except blobs.NotStored:  # only some are kept
            continue
    return Adapter.from_bytes(epoch.manifest, await blobs.load(link, last.snapshot))


async def open_epoch(
    link: Link,
    job: Waiting,
    start: NDArray[np.int32],
    anchor: NDArray[np.int32],
    distilled: Distilled,
) -> int:
    """The job goes on at `start` (d,), with `anchor` (d,), in the epoch that is returned.

    Raises:
        RejectError: the aggregator refuses; says why.
        TransientError: broker or aggregator do not answer.
    """
    manifest = next_epoch(job.adapter.manifest)
    data = encode_manifest(manifest)

    async def stored(theta: NDArray[np.int32]) -> BlobRef:
        return await blobs.put(link, Adapter.placed(data, job.round, theta).to_bytes())

    request = OpenEpoch(
        job=job.job,
        manifest=data,
        start=await stored(start),
        anchor=await stored(anchor),
        distilled=distilled,
    )
    answer = await link.request(subjects.JOB_EPOCH, encode(request), timeout_s=ANSWER_S)
    decode_answer(answer, request, JobAccepted)
    return manifest.epoch
