"""What the operator of a schedule asks for."""

import hashlib
from pathlib import Path

from shared.codec import encode_manifest
from shared.messages import (
    Block,
    Evaluation,
    JobSpec,
    Manifest,
    Pacing,
    SubmitJob,
    Task,
    Tuning,
    Variant,
)
from tests.chaos.faults import Scenario

D = 12
"""Parameters of the adapter."""


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
        evaluation=Evaluation(every_rounds=given.evaluate_every),
        snapshot_every=given.snapshot_every,
    )
    return SubmitJob(job=f"job-{number}", spec=spec, manifest=encode_manifest(manifest))
