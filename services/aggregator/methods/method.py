"""What a tuning method decides; each has its file, and is found by its name in the job.

A method is pure and holds nothing: what it must remember is in the log, and handed to it. A round
begins with a Plan and ends with a Closing: a commit, or the word that more is wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.aggregator.pooling import Pool
from shared.adapter import Adapter
from shared.errors import RejectError
from shared.messages import (
    Frozen,
    Importance,
    LocalSteps,
    Manifest,
    Range,
    RoundOpened,
    Term,
    Tuning,
    Walk,
)


@dataclass(frozen=True)
class Past:
    """What earlier rounds of the job have left."""

    commits: int
    terms: Sequence[Term] = ()
    """Of the newest commit."""
    importance: Importance | None = None


@dataclass(frozen=True)
class Plan:
    """What the next round's devices measure."""

    stream_round: int
    directions: int
    survivors: list[Range] = field(default_factory=list[Range])
    walk: Walk | None = None
    local: LocalSteps | None = None


@dataclass(frozen=True)
class RoundSums:
    """A round, and what came in for it."""

    opened: RoundOpened
    pool: Pool


@dataclass(frozen=True)
class Closing:
    """What a close commits, and what it fixes for latecomers; without `frozen`: more is wanted."""

    terms: list[Term]
    frozen: Frozen | None
    signal: float | None
    variance: float | None = None


class Method:
    """A round of fresh directions, each measured where the adapter stands."""

    walks = False
    """Whether devices move by themselves between measurements."""

    def check(self, tuning: Tuning, manifest: Manifest) -> None:
        """Find numbers that the method cannot work with.

        Raises:
            RejectError: names the number and the mend.
        """

    def plan(self, tuning: Tuning, adapter: Adapter, number: int, past: Past) -> Plan:
        """Of round `number`, with `adapter` as it stands."""
        return Plan(stream_round=number, directions=tuning.directions)

    def close(self, rounds: Sequence[RoundSums], tuning: Tuning, adapter: Adapter) -> Closing:
        """What becomes of `rounds`: those carried on from before, and last the one that closes.

        The last one holds at least one measurement.
        """
        raise NotImplementedError


def plain(name: str, tuning: Tuning, final_step: float) -> None:
    """Find what a paper's method has no place for.

    Raises:
        RejectError: says what to set.
    """
    wanted = {"how": "probe", "normalise": "none", "momentum": 0, "final_step": final_step}
    for field_name, value in wanted.items():
        given = getattr(tuning, field_name)
        if given != value:
            raise RejectError(f"method {name!r}: {field_name} is {given!r}, it must be {value!r}")
