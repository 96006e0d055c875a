"""What epochs start with, brought from the store: the one thing of a job that the log has not.

A start that cannot be had holds up its own job and no other.
"""

from services.aggregator.state import JobState
from shared import blobs
from shared.bus import Streams
from shared.clock import Clock
from shared.errors import TransientError
from shared.logs import get

log = get("aggregator")


class Starts:
    """Brings each job's; what was not to be had is asked for again after a while."""

    def __init__(self, streams: Streams, clock: Clock) -> None:
        self._streams = streams
        self._clock = clock
        self._missing: dict[str, tuple[float, TransientError]] = {}
        """By job: when it is worth asking again, and why it was not to be had."""

    @property
    def problem(self) -> str:
        """Why a job cannot go on; empty if all can."""
        return next((str(error) for _, error in self._missing.values()), "")

    def put_off(self, job: JobState) -> bool:
        """Whether the job's start was not to be had a moment ago."""
        missing = self._missing.get(job.job)
        return missing is not None and self._clock.now() < missing[0]

    def forget(self, job: JobState) -> None:
        """The job needs its start no more."""
        self._missing.pop(job.job, None)

    async def bring(self, job: JobState) -> None:
        """The job's adapter is at hand.

        Raises:
            TransientError: what its epoch starts with cannot be had now.
        """
        if job.start is None or job.ended:
            return
        if self.put_off(job):
            raise self._missing[job.job][1]
        try:
            data = await blobs.load(self._streams, job.start)
        except TransientError as error:
            why = TransientError(f"start of job {job.job}: {error}", delay_s=error.delay_s)
            self._missing[job.job] = (self._clock.now() + error.delay_s, why)
            log.warning("start_missing", job=job.job, error=str(error))
            raise why from error
        self._missing.pop(job.job, None)
        job.begin(data)
