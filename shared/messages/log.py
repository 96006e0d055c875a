"""The facts of a job. LOG is public and holds all that theta is made of; DETAIL names devices."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.messages.base import (
    Count,
    Digest,
    Finite,
    Message,
    Name,
    Part,
    Range,
    Ranges,
    Record,
    Round,
    Seconds,
)
from shared.messages.jobs import BlobRef, Distilled, How, JobSpec


class JobOpened(Message, frozen=True):
    job: Name
    spec: JobSpec


class EpochOpened(Message, frozen=True):
    """The adapter starts at zero over what `manifest` (an encoded Manifest) says, or at `start`.

    Round numbers go on from epoch to epoch; commits are counted anew.
    """

    job: Name
    epoch: Count
    manifest: bytes
    digest: Digest
    """Of the adapter as it starts: without `start` at theta = 0, round 0."""
    start: BlobRef | None = None
    """The adapter that the epoch starts with, in the form of a snapshot."""
    anchor: BlobRef | None = None
    """The adapter over the same manifest that stands for the base model in the ensemble; None: the
    base model itself."""
    distilled: Distilled | None = None
    """How `start` was made, where it was distilled."""


class Walk(Record, frozen=True):
    """A device's steps of its own from the round's adapter, each along one direction of the pool.

    Direction k is drawn with probability weights[k] / sum(weights); without `weights`, all alike.
    """

    steps: Annotated[int, Meta(ge=1, le=4096)]
    step: Finite
    """Learning rate of the mean loss in units of theta."""
    held: Finite = 0.0
    """Above 0: the sizes of the slopes are wanted too, each held within this."""
    weights: Annotated[bytes, Meta(max_length=131_072)] = b""


class LocalSteps(Record, frozen=True):
    """A device's steps of its own down its loss in closed form: Adam's, on mini-batches of `rows`.

    The slopes that it answers with are those of its move: minus its product with each direction.
    """

    steps: Annotated[int, Meta(ge=1, le=4096)]
    rows: Annotated[int, Meta(ge=1, le=2**20)]
    rate: Finite
    """Adam's step, in units of theta."""


class RoundOpened(Message, frozen=True):
    """Devices may measure round `round` at the adapter `digest`.

    `tune` rounds have a pool of `directions` from stream `stream_round`; an `evaluate` round has
    none and waits for evaluations alone. `block_first, block_count` is the scope: which manifest
    blocks the directions move.
    """

    job: Name
    epoch: Count
    round: Round
    stream_round: Round
    kind: Literal["tune", "evaluate"]
    how: How
    directions: Count
    eps: Finite
    batch_rows: Count
    scope: tuple[Count, Count]
    digest: Digest
    evaluate: bool
    enough_devices: Count
    enough_probes: Count
    over_selection: Finite
    deadline_s: Seconds
    commits: Count = 0
    """How many rounds of the job have moved theta so far."""
    batch_round: Round = 0
    """Devices measure the mini-batch of this round: 0, their own."""
    survivors: Ranges = []
    """Those of the pool's directions that are worth measuring; empty: all."""
    walk: Walk | None = None
    """Devices walk by themselves instead of probing at one place."""
    local: LocalSteps | None = None
    """Devices answer with a move of their own instead of the gradient; in `exact` rounds only."""


class Term(Record, frozen=True):
    """A sum of directions of one stream round: sum_j c_j z_j over `ranges`, in order.

    `coefficients` are little-endian int32 in units of 2^-24; |c| <= 2^22.
    """

    stream_round: Round
    scope: tuple[Count, Count]
    ranges: Ranges
    coefficients: bytes


class Commit(Record, frozen=True):
    """How theta moves: V = (momentum V >> 8) + sum of terms; theta += V << scale.

    Without momentum as update rule V is just the sum.
    """

    momentum: Annotated[int, Meta(ge=0, le=255)]
    terms: Annotated[list[Term], Meta(max_length=64)]


class Frozen(Record, frozen=True):
    """What a round's close fixed for those who come late.

    A late update's coefficient is round(w * step * clipped slope * weight / (normaliser + late)),
    with w = 1 / (1 + rounds late) and `late` the weight of all latecomers up to and with it.
    """

    round: Round
    stream_round: Round
    scope: tuple[Count, Count]
    eps: Finite
    step: Finite
    clip: Finite
    normaliser: Finite


class RoundClosed(Message, frozen=True):
    """The commit of a round; `digest` is the adapter's after it.

    `commit` is null where theta did not move. An abandoned or stopped round commits its late terms
    alone; an evaluation round commits nothing. With `more`, nor does this one: its sums are carried
    on, and the next round measures the same batch along fresh directions.
    `detail_sequence` is the last of DETAIL that was counted.
    """

    job: Name
    epoch: Count
    round: Round
    reason: Literal["enough", "deadline", "abandoned", "evaluated", "stopped"]
    commit: Commit | None
    digest: Digest
    detail_sequence: Count
    frozen: Frozen | None = None
    updates: Count = 0
    late: Count = 0
    devices: Count = 0
    probes: Count = 0
    weight: Count = 0
    loss: Finite | None = None
    """Mean loss of the devices' batches before this commit, nats per unit of weight."""
    signal: Finite | None = None
    """Signal-to-noise of the pooled slopes, from two halves of the updates; null if one came."""
    more: bool = False
    variance: Finite | None = None
    """What the method's variance test saw, where it has one; null if one half came."""


class AdapterEvaluated(Message, frozen=True):
    """A trusted device measured the adapter as it was when `round` opened."""

    job: Name
    epoch: Count
    round: Round
    digest: Digest
    examples: Count
    correct: Count
    weight: Count
    loss: Finite
    """Summed loss, nats."""
    detail_sequence: Count
    """The UpdatesFolded that it was made from."""


class ModelPublished(Message, frozen=True):
    """The adapter after `round` as a blob: a snapshot to resume from or to serve."""

    job: Name
    epoch: Count
    round: Round
    digest: Digest
    snapshot: BlobRef
    epoch_sequence: Count = 0
    """Where in stream LOG the epoch was opened; 0: not said."""


class JobEnded(Message, frozen=True):
    job: Name
    epoch: Count
    round: Round
    reason: Literal["finished", "stopped"]
    digest: Digest


LogEvent = (
    JobOpened
    | EpochOpened
    | RoundOpened
    | RoundClosed
    | AdapterEvaluated
    | ModelPublished
    | JobEnded
)


class FoldedUpdate(Record, frozen=True):
    """One update's row in UpdatesFolded: its key, what became of it, and what it was worth."""

    device: Name
    round: Round
    part: Part
    outcome: Literal["folded", "late"]
    probes: Count = 0
    weight: Count = 0
    slope: Finite = 0.0
    """Root mean square of its slopes: an estimate of its gradient's norm, nats per unit theta."""
    work_s: Seconds = 0.0
    kind: Literal["probe", "evaluate"] = "probe"
    mass: Count = 0
    """What it adds to its round's normaliser if it is late; 0: weight times probes."""


class PoolSums(Record, frozen=True):
    """Integer sums of one half's updates over the directions of `span`; little-endian int64.

    `differences` and `bends` (empty: all zero) in 2^-20 nat, dense over the span; `weights` alike,
    or a single number where all are equal. `half` is 0 or 1: the signal test compares the halves.
    """

    span: Range
    half: Annotated[int, Meta(ge=0, le=1)]
    differences: bytes
    bends: bytes
    weights: bytes
    round: Round = 0
    """Whose pool: 0, that of the round that was open."""


class WalkSums(Record, frozen=True):
    """Sums of one half's walks over the directions `ranges`, in order; little-endian int64.

    `differences` are the walks' own, each times its share, `share` is the sum of shares. `sizes`
    and `visits` are plain sums, empty where nobody asked for them. Of late walks they come alone,
    with `differences` and `share` zero.
    """

    ranges: Annotated[list[Range], Meta(max_length=2**16)]
    half: Annotated[int, Meta(ge=0, le=1)]
    differences: bytes
    share: Count
    sizes: bytes = b""
    visits: bytes = b""
    round: Round = 0


class EvaluationSums(Record, frozen=True):
    """What trusted devices measured of the adapter as `round` opened, summed; loss in nats."""

    round: Round
    digest: Digest
    examples: Count
    correct: Count
    weight: Count
    loss: Finite


class UpdatesFolded(Message, frozen=True):
    """A batch of accepted updates, as the sums they add to the round's pool.

    `late` are ready terms, with coefficients in full, for the next close.
    """

    job: Name
    epoch: Count
    round: Round  # the one that was open
    updates: list[FoldedUpdate]
    sums: list[PoolSums] = []
    late: list[Term] = []
    evaluations: list[EvaluationSums] = []
    loss: int = 0
    """Sum of S0 over the updates in `sums`, 2^-20 nat."""
    loss_weight: Count = 0
    walks: list[WalkSums] = []


class Contribution(Record, frozen=True):
    """What one device did for a round."""

    device: Name
    parts: Count
    probes: Count
    weight: Count
    slope: Finite
    work_s: Seconds
    late: Count


class Importance(Record, frozen=True):
    """What all walks of a job so far say of each direction of the pool; little-endian int64 (K,).

    `sizes` sums the sizes of slopes as differences in 2^-20 nat, `visits` counts them.
    """

    sizes: bytes
    visits: bytes


class RoundReport(Message, frozen=True):
    """Per-device contributions to the round just closed: what the bandit learns from."""

    job: Name
    epoch: Count
    round: Round
    contributions: list[Contribution]
    importance: Importance | None = None


DetailEvent = UpdatesFolded | RoundReport


class WriterStarted(Message, frozen=True):
    """A process writes the stream from here on; whoever wrote to it before is fenced off by this.

    Says nothing of any job: readers of jobs skip it.
    """

    writer: Annotated[str, Meta(max_length=64)]
    """Names this life of the process."""
