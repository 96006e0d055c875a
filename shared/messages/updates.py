"""Edge to aggregator: what was measured, and what became of it."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.messages.base import (
    Count,
    Digest,
    Message,
    Name,
    Part,
    Ranges,
    Record,
    Round,
    Seconds,
)
from shared.messages.jobs import How

Packed = Annotated[bytes, Meta(max_length=262_144)]


class UpdateKey(Record, frozen=True):
    """Names one piece of work for ever; its first arrival wins."""

    job: Name
    epoch: Annotated[int, Meta(ge=0, lt=2**32)]
    round: Round
    device: Name
    part: Part

    def text(self) -> str:
        """The key as it stands in a header, a file name and a ledger."""
        return f"{self.job}.{self.epoch}.{self.round}.{self.device}.{self.part}"


class ProbeResult(Record, frozen=True, tag_field="kind", tag="probe"):
    """Differences and bends along directions `ranges`, in their order.

    `differences` (S+ - S-) and `bends` (S+ + S- - 2 S0) are little-endian int32 in 2^-20 nat of
    summed loss; `bends` is empty for `how: exact`. `loss` is S0 in 2^-20 nat, `weight` what it is
    summed over (tokens, or examples for choices).
    """

    how: How
    ranges: Ranges
    differences: Packed
    bends: Packed
    loss: Annotated[int, Meta(ge=0, le=2**52)]
    weight: Annotated[int, Meta(ge=0, lt=2**31)]
    dropped: Count = 0
    """Probes left out because they were not finite or did not fit int32."""


class WalkResult(Record, frozen=True, tag_field="kind", tag="walk"):
    """Sums over a walk's steps, by the direction of each: `ranges` are those it went along.

    `differences` is the sum of (S+ - S-) / weight of each step's batch, int32 in 2^-20 nat, so that
    the sum of slopes is that over 2 eps. Where sizes were asked for, `sizes` sums their absolute
    values, held as asked, int64, and `visits` counts the steps, uint16. `loss` is the sum of
    (S+ + S-) / 2 in 2^-20 nat and `weight` what it is summed over. All little-endian.
    """

    ranges: Ranges
    differences: Packed
    share: Annotated[int, Meta(ge=1, le=2**20)]
    """Rows that the device holds: what its word weighs among the others'."""
    steps: Annotated[int, Meta(ge=0, le=4096)]
    loss: Annotated[int, Meta(ge=0, le=2**52)]
    weight: Annotated[int, Meta(ge=0, lt=2**31)]
    sizes: Packed = b""
    visits: Packed = b""
    dropped: Count = 0
    """Steps not taken because they were not finite or did not fit int32."""


class EvaluateResult(Record, frozen=True, tag_field="kind", tag="evaluate"):
    """Summed loss (nats) over the held-out rows, and how many were answered right."""

    examples: Annotated[int, Meta(ge=0, lt=2**31)]
    correct: Annotated[int, Meta(ge=0, lt=2**31)]
    weight: Annotated[int, Meta(ge=0, lt=2**31)]
    loss: Annotated[float, Meta(ge=0.0, le=1e15)]


class SubmitUpdate(Message, frozen=True):
    """One finished piece of work, measured at the adapter `digest`; sent until it is settled."""

    key: UpdateKey
    digest: Digest
    result: ProbeResult | EvaluateResult | WalkResult
    work_s: Seconds
    passes: Count = 0
    """Tokens sent forward through the model for it, everything counted."""


class UpdateSettled(Message, frozen=True):
    """Final word on an update: its device may forget it. `key` is the text of its UpdateKey."""

    key: Annotated[str, Meta(max_length=400)]
    outcome: Literal["folded", "late", "duplicate", "too_late", "rejected"]
    reason: str = ""
