"""What the operator of a schedule asks for."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared import adapter
from shared.adapter import Adapter
from shared.blobs import reference
from shared.codec import decode_manifest, encode_manifest
from shared.messages import (
    Block,
    Evaluation,
    JobSpec,
    Manifest,
    OpenEpoch,
    Pacing,
    SubmitJob,
    Task,
    Tuning,
    Variant,
)
from tests.chaos.faults import Scenario


@dataclass(frozen=True)
class NextEpoch:
    """A request, and the blob that it names."""

    request: OpenEpoch
    start: bytes


D = 12
"""Parameters of the adapter."""
SECOND_EPOCH_EVERY = 4
"""So many jobs to one that has a second epoch."""
IMPATIENT_EVERY = 3
"""So many jobs to one that ends when a measurement brings nothing better."""


def next_epoch(name: str, manifest: bytes, round: int, theta: NDArray[np.int64]) -> NextEpoch:
    """What the operator asks a job that waits after `round` at `theta` (d,): to go on at half."""
    data = encode_manifest(adapter.next_epoch(decode_manifest(manifest)))
    start = Adapter.placed(data, round, (theta // 2).astype(np.int32)).to_bytes()
    return NextEpoch(OpenEpoch(job=name, manifest=data, start=reference(start)), start)


def a_job(given: Scenario, number: int, model: Path) -> SubmitJob:
    """The job that the operator submits, on the model at `model`."""
    blocks = [
        Block("control", "l_out-0", [D - 4], layer=0),
        Block("control", "l_out-1", [4], layer=1, scale=1),
    ]
    data = model.read_bytes()
    variant = Variant(hashlib.sha256(data).hexdigest(), len(data), model.name)
    manifest = Manifest(
        epoch=0,
        architecture="fake",
        seed=given.seed % 2**60,
        blocks=blocks,
        variants=[variant],
        d=D,
        update_rule="momentum" if given.momentum else "plain",
    )
    tuning = Tuning(
        rounds=given.rounds,
        directions=given.directions,
        step=0.001,
        normalise=given.normalise,
        momentum=given.momentum,
    )
    pacing = Pacing(
        enough_devices=given.enough_devices,
        enough_probes=given.enough_probes,
        deadline_s=given.deadline_s,
        minimum_probes=given.minimum_probes,
        lateness_rounds=given.lateness_rounds,
    )
    spec = JobSpec(
        task=Task("choices", "{text} is", {"up": "alpha", "down": "beta"}),
        tuning=tuning,
        pacing=pacing,
        evaluation=Evaluation(
            every_rounds=given.evaluate_every,
            patience=1 if (given.seed + number) % IMPATIENT_EVERY == 0 else 0,
        ),
        snapshot_every=given.snapshot_every,
        epochs=2 if (given.seed + number) % SECOND_EPOCH_EVERY == 0 else 1,
    )
    return SubmitJob(job=f"job-{number}", spec=spec, manifest=encode_manifest(manifest))
