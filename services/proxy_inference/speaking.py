"""What the worker steps: a pass goes in, logits of every read position come out."""

from collections.abc import Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Plan, Schedule, Sequence, Share
from services.proxy_inference.running import Run
from services.proxy_inference.sampling import Draft

BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Room:
    """How large a context is."""

    cells: int
    lanes: int
    threads: int


@dataclass(frozen=True, slots=True)
class Heard:
    """Of one sequence: the logits (reads, n_vocab), and the drafts that were sent along.

    With drafts there is a row more than drafts, and `share` counts them.
    """

    share: Share
    logits: NDArray[np.float32]
    drafts: tuple[Draft, ...] = ()
    error: str = ""
    """Why nothing was heard: the sequence ends, the caches are as they should be."""


def parted(shares: Several[Share], rows: NDArray[np.float32]) -> list[Heard]:
    """The rows of a pass, by sequence."""
    found: list[Heard] = []
    at = 0
    for share in shares:
        found.append(Heard(share, rows[at : at + share.reads]))
        at += share.reads
    return found


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of one sequence's part of a pass: so many of its drafts were taken."""

    heard: Heard
    taken: int
    ended: bool


class Speaker(Protocol):
    """One version in some mode. Opened and closed by one thread, stepped by another."""

    @property
    def room(self) -> Room: ...

    @property
    def most_reads(self) -> int: ...

    @property
    def idle_cells(self) -> int:
        """Of the cache's cells, so many may be kept for nobody in particular."""
        ...

    def speak(self, plan: Plan, schedule: Schedule, runs: Mapping[Sequence, Run]) -> list[Heard]:
        """Make the pass; the logits are valid until the next one.

        Raises:
            EngineError: it failed; the cache is in no known state.
        """
        ...

    def settle(self, settled: list[Settled]) -> None:
        """What became of the pass."""
        ...

    def clear(self) -> None:
        """The cache is empty."""
        ...

    def close(self) -> None: ...
