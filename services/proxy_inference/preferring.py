"""Which of a job's versions did best on held-out rows, as far as it can be had. Pure."""

from collections.abc import Mapping, Set
from typing import Literal

from shared.heldout import HeldOut
from shared.messages import EpochOpened, JobOpened, LogEvent, ModelPublished

Prefer = Literal["best", "newest"]


class Preference:
    """All jobs' measurements; none counts where the newest version is preferred."""

    def __init__(self, prefer: Prefer) -> None:
        self._prefer: Prefer = prefer
        self._held_out: dict[str, HeldOut] = {}
        self._before: dict[str, str] = {}
        """By job, the digest of the best of the epoch before."""
        self._absent: set[str] = set()
        """Digests of what the store did not have when it was asked for, until more is published."""

    def see(self, event: LogEvent) -> None:
        """Take in one fact of the log."""
        if self._prefer == "newest":
            return
        match event:
            case JobOpened():
                self._held_out[event.job] = HeldOut()
            case EpochOpened() if event.job in self._held_out:
                best = self._held_out[event.job].best
                self._before[event.job] = best.digest if best else ""
            case ModelPublished():
                self._absent.clear()
            case _:
                pass
        if event.job in self._held_out:
            self._held_out[event.job].see(event)

    def miss(self, digest: str) -> None:
        """The store does not have this version."""
        self._absent.add(digest)

    def best(self, job: str, usable: Mapping[str, int], kept: Set[str]) -> str | None:
        """The digest of the best of the job's `usable` versions, which are epochs by digest.

        What is `kept` here cannot be missed. That of the epoch before stays the best until the
        present one has published. None where nothing was measured.
        """
        if job not in self._held_out:
            return None
        missed = self._absent - kept
        for published in self._held_out[job].ranked():
            if published.digest in usable and published.digest not in missed:
                return published.digest
        before = self._before.get(job, "")
        if before not in usable or before in missed or max(usable.values()) > usable[before]:
            return None
        return before
