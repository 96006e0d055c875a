"""Whether a job, or an epoch of it, can work at all, and the events that begin it."""

from collections.abc import Sequence

from services.aggregator.methods import METHODS
from shared.adapter import Adapter
from shared.codec import decode_manifest
from shared.dataset import check_task
from shared.errors import EngineError, MalformedMessage, RejectError
from shared.messages import (
    Block,
    EpochOpened,
    JobOpened,
    JobSpec,
    LogEvent,
    Manifest,
    OpenEpoch,
    SubmitJob,
    Task,
    Tuning,
)

MAX_EVENT_BYTES = 900_000
"""What the parts of an event that grow with its round may come to; the broker takes 1 MB."""
BYTES_A_DIRECTION = 40
"""Of an UpdatesFolded: two halves' differences and weights, and the bends."""
BYTES_A_WALKED = 64
"""Of one with walks: their ranges, two halves' differences, sizes and visits."""
BYTES_A_LATE_ROUND = 4


def open_job(message: SubmitJob) -> list[LogEvent]:
    """The events that begin a job.

    Raises:
        RejectError: the spec or the manifest cannot work; the text names what.
    """
    tuning = message.spec.tuning
    if tuning.method not in METHODS:
        raise RejectError(f"method {tuning.method!r} is unknown; known: {sorted(METHODS)}")
    method = METHODS[tuning.method]
    _check_task(message.spec.task)
    _check_sizes(message.spec, walks=method.walks)
    adapter = Adapter(message.manifest)
    if adapter.manifest.epoch != 0:
        raise RejectError("a job begins with epoch 0")
    _check_adapter(tuning, adapter.manifest)
    return [
        JobOpened(job=message.job, spec=message.spec),
        EpochOpened(job=message.job, epoch=0, manifest=message.manifest, digest=adapter.digest()),
    ]


def open_epoch(
    message: OpenEpoch, spec: JobSpec, before: Adapter, start: bytes, anchor: bytes | None
) -> EpochOpened:
    """The epoch that follows the one which ended at `before`.

    `start` and `anchor` are the bytes of the blobs that the message names.

    Raises:
        RejectError: the manifest cannot work, or a blob is no adapter of it; says which.
    """
    manifest, number = Adapter(message.manifest).manifest, before.manifest.epoch + 1
    if manifest.epoch != number:
        raise RejectError(f"the manifest is of epoch {manifest.epoch}, next is epoch {number}")
    if manifest.architecture != before.manifest.architecture:
        raise RejectError(
            f"the manifest is for {manifest.architecture}, the job tunes a model of architecture"
            f" {before.manifest.architecture}"
        )
    _check_adapter(spec.tuning, manifest)
    begins = _snapshot("start", message.manifest, start)
    if begins.round != before.round:
        raise RejectError(
            f"start is an adapter after round {begins.round}, the job waits after {before.round}"
        )
    if begins.velocity is not None and begins.velocity.any():
        raise RejectError("start has a velocity; an epoch begins without")
    if anchor is not None:
        _snapshot("anchor", message.manifest, anchor)
    return EpochOpened(
        job=message.job,
        epoch=number,
        manifest=message.manifest,
        digest=begins.digest(),
        start=message.start,
        anchor=message.anchor,
        distilled=message.distilled,
    )


def most_snapshot_bytes(manifest: bytes) -> int:
    """What a snapshot of an adapter of `manifest` (encoded) may have: theta, V, some words.

    Raises:
        MalformedMessage: it is no manifest.
    """
    return 12 * decode_manifest(manifest).d + 1024


def _snapshot(name: str, manifest: bytes, data: bytes) -> Adapter:
    try:
        return Adapter.from_bytes(manifest, data)
    except MalformedMessage as error:
        raise RejectError(f"{name} is no adapter of the manifest: {error}") from error


def _check_adapter(tuning: Tuning, manifest: Manifest) -> None:
    """Find a manifest that the job's tuning cannot move."""
    if manifest.epoch_of_a > manifest.epoch:
        raise RejectError(
            f"a_epoch {manifest.epoch_of_a} is later than the epoch itself, {manifest.epoch}"
        )
    METHODS[tuning.method].check(tuning, manifest)
    if (tuning.momentum > 0) != (manifest.update_rule == "momentum"):
        raise RejectError("momentum and the manifest's update_rule disagree")
    if tuning.how == "exact" and not _may_be_closed(manifest.blocks):
        raise RejectError(
            "how 'exact' needs an adapter of output rows and the last block's LoRA alone; "
            "use how 'probe'"
        )


def _may_be_closed(blocks: Sequence[Block]) -> bool:
    """Output rows, and LoRA in a single block; that it is the last, the engines know."""
    tensors = [block.tensor.split(".")[:2] for block in blocks if block.kind == "lora_b"]
    one_block = all(where == tensors[0] and where[0] == "blk" for where in tensors)
    return one_block and all(block.kind in ("lora_a", "lora_b", "output_rows") for block in blocks)


def _check_task(task: Task) -> None:
    try:
        check_task(task)
    except EngineError as error:
        raise RejectError(str(error)) from error
    words = list(task.labels.values())
    twice = {word for word in words if words.count(word) > 1}
    if twice:
        raise RejectError(f"task: labels share the word {min(twice)!r}; give each its own")


def _check_sizes(spec: JobSpec, *, walks: bool) -> None:
    tuning, pacing = spec.tuning, spec.pacing
    if pacing.minimum_probes > pacing.enough_probes:
        raise RejectError(
            f"pacing: minimum_probes {pacing.minimum_probes} is more than enough_probes"
            f" {pacing.enough_probes}"
        )
    carried = (tuning.most_more + 1) * 4 * tuning.directions
    if tuning.method == "fwdllm" and carried > MAX_EVENT_BYTES:
        raise RejectError(
            f"tuning: {tuning.most_more + 1} rounds of {tuning.directions} directions do not fit"
            " one commit; lower directions or most_more"
        )
    each = BYTES_A_WALKED if walks else BYTES_A_DIRECTION
    most = MAX_EVENT_BYTES // (each + BYTES_A_LATE_ROUND * pacing.lateness_rounds)
    directions = tuning.directions * tuning.candidates
    if directions > most:
        raise RejectError(
            f"tuning: {directions} directions do not fit one event of the log; at most"
            f" {most} do with lateness_rounds {pacing.lateness_rounds}"
        )
