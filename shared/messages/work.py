"""Edge and scheduler: what a device can do, and what it should do."""

from typing import Annotated

from msgspec import Meta

from shared.messages.base import (
    Count,
    Digest,
    Finite,
    Message,
    Name,
    Part,
    Ranges,
    Record,
    Round,
    Seconds,
    Text,
)
from shared.messages.jobs import How
from shared.messages.log import LocalSteps, Walk
from shared.messages.updates import UpdateKey


class Speed(Record, frozen=True):
    """Measured on the device for one job: seconds per probe (both passes) and per evaluation."""

    job: Name
    probe_s: Seconds = 0.0
    exact_s: Seconds = 0.0
    evaluate_s: Seconds = 0.0


class RequestWork(Message, frozen=True):
    """A device with a free hand asks what to do.

    `last` is the last key it was assigned, so that a restarted scheduler numbers on from it.
    """

    device: Name
    kinds: Annotated[list[Annotated[str, Meta(max_length=32)]], Meta(max_length=32)]
    last: UpdateKey | None = None
    spooled: Count = 0
    declined: Annotated[str, Meta(max_length=400)] = ""
    """Why the work of `last` was not done, if it was not."""


class ProbeWork(Record, frozen=True, tag_field="kind", tag="probe"):
    """Measure the slopes along directions `ranges` of the round's pool."""

    how: How
    ranges: Ranges
    local: LocalSteps | None = None


class WalkWork(Record, frozen=True, tag_field="kind", tag="walk"):
    """Walk from the adapter along directions drawn from the pool, a mini-batch a step."""

    directions: Count
    walk: Walk


class EvaluateWork(Record, frozen=True, tag_field="kind", tag="evaluate"):
    """Measure loss and accuracy on the held-out rows."""


class WorkAssigned(Message, frozen=True):
    """Do this at the adapter `digest`, which is the job's when `round` opened."""

    key: UpdateKey
    digest: Digest
    stream_round: Round
    work: ProbeWork | EvaluateWork | WalkWork
    eps: Finite
    batch_rows: Count
    scope: tuple[Count, Count]
    deadline_s: Seconds
    batch_round: Round = 0
    """Measure the mini-batch of this round: 0, that of the key."""


class ComeBack(Message, frozen=True):
    """Nothing now. Come after `after_s`, or at once when woken. `report`: send a DeviceReport."""

    after_s: Seconds
    reason: Text
    report: bool = False


class WakeUp(Message, frozen=True):
    """The scheduler has work for this device now."""

    job: Name


STOPPED = "stopped"
"""The problem of a device whose daemon has said goodbye."""


class DeviceReport(Message, frozen=True):
    """What a device is and has: sent at start, when asked, when it changes, every 15 minutes."""

    device: Name
    version: Annotated[str, Meta(max_length=40)]
    cores: Count
    memory_mb: Count
    rows: Count
    heldout_rows: Count
    trusted: bool
    models: Annotated[list[Digest], Meta(max_length=64)]
    speeds: Annotated[list[Speed], Meta(max_length=64)] = []
    counters: Annotated[dict[str, int], Meta(max_length=200)] = {}
    problem: Text = ""
    """Why it cannot help with any job, if it cannot; names the mend."""
    unable: Annotated[dict[Name, Text], Meta(max_length=64)] = {}
    """job -> why it cannot help with that one for now; names the mend."""
    positions: Annotated[dict[str, str], Meta(max_length=64)] = {}
    """job -> `<round>:<digest>` that its engine stands at."""


class DecisionMade(Message, frozen=True):
    """What the scheduler assigned to whom, and why."""

    job: Name
    round: Round
    device: Name
    part: Part
    kind: str
    probes: Count
    reason: Text
    index: Finite = 0.0
    """The arm's upper confidence bound when it was chosen."""
    mean: Finite = 0.0
    plays: Count = 0
