"""A job's blobs: what its epochs start with is brought, its versions are put there and removed.

They are what the log has not. A start that cannot be had holds up its own job and no other.
"""

from collections.abc import Iterable

from services.aggregator.state import JobState
from shared import blobs
from shared.bus import Streams
from shared.clock import Clock
from shared.errors import RejectError, TransientError
from shared.logs import get
from shared.messages import BlobRef
from shared.metrics import Counters

log = get("aggregator")

_TIDY_AGAIN_S = 10.0


class Store:
    """The blob store as the aggregator uses it; what was not to be had is asked for again later."""

    def __init__(self, streams: Streams, clock: Clock, counters: Counters) -> None:
        self._streams = streams
        self._clock = clock
        self._counters = counters
        self._missing: dict[str, tuple[float, TransientError]] = {}
        """By job: when it is worth asking for its start again, and why it was not to be had."""
        self._full = ""
        """Why a snapshot that is due cannot be stored now."""
        self._removed: dict[str, set[BlobRef]] = {}
        """By job, those of its outdated snapshots that the store has been told to forget."""
        self._tidy_from = 0.0
        """When it is worth telling it again."""

    @property
    def problem(self) -> str:
        """Why a job cannot go on; empty if all can."""
        return self._full or next((str(error) for _, error in self._missing.values()), "")

    def put_off(self, job: JobState) -> bool:
        """Whether the job's start was not to be had a moment ago."""
        missing = self._missing.get(job.job)
        return missing is not None and self._clock.now() < missing[0]

    async def bring(self, job: JobState, *, anew: bool = False) -> None:
        """The job's adapter is at hand, or no longer needed; `anew`: asked for without delay.

        Raises:
            TransientError: what its epoch starts with cannot be had now; NotStored: the store does
                not have it.
        """
        if job.start is None or job.ended:
            self._missing.pop(job.job, None)
            return
        if self.put_off(job) and not anew:
            raise self._missing[job.job][1]
        try:
            data = await blobs.load(self._streams, job.start)
        except TransientError as error:
            kind = blobs.NotStored if isinstance(error, blobs.NotStored) else TransientError
            why = kind(f"start of job {job.job}: {error}", delay_s=error.delay_s)
            self._missing[job.job] = (self._clock.now() + error.delay_s, why)
            log.warning("start_missing", job=job.job, error=str(error))
            raise why from error
        self._missing.pop(job.job, None)
        job.begin(data)

    async def named(self, name: str, ref: BlobRef, most_bytes: int) -> bytes:
        """The blob that an operator's request names as its `name`.

        Raises:
            RejectError: it is too large, or not to be had; the text names the mend.
        """
        if ref.size_bytes > most_bytes:
            raise RejectError(
                f"{name} has {ref.size_bytes} bytes; an adapter of the manifest has {most_bytes} "
                "at most"
            )
        try:
            return await blobs.load(self._streams, ref)
        except TransientError as error:
            raise RejectError(f"{name}: {error}; then ask again") from error

    async def put(self, job: JobState) -> BlobRef:
        """A snapshot of the job's adapter as it stands.

        Raises:
            TransientError: the broker does not take it; `problem` says so until it does.
        """
        try:
            reference = await blobs.put(self._streams, job.adapter.to_bytes())
        except TransientError as error:
            self._full = str(error)
            self._counters.add("appends_failed")
            raise
        self._full = ""
        return reference

    async def tidy(self, job: JobState, jobs: Iterable[JobState]) -> None:
        """The job's outdated snapshots are gone, but for what one of `jobs` needs.

        What the broker fails is left for the next time.
        """
        outdated = job.snapshots.outdated
        removed = self._removed[job.job] = self._removed.get(job.job, set()).intersection(outdated)
        left = [snapshot for snapshot in outdated if snapshot not in removed]
        if not left or self._clock.now() < self._tidy_from:
            return
        needed = {snapshot for other in jobs for snapshot in other.snapshots.needed}
        try:
            for snapshot in left:
                if snapshot not in needed:
                    await blobs.delete(self._streams, snapshot)
                    removed.add(snapshot)
        except TransientError as error:
            self._tidy_from = self._clock.now() + _TIDY_AGAIN_S
            log.warning("snapshot_not_removed", job=job.job, error=str(error))
