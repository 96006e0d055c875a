"""Jobs, manifests and updates for tests of the logic."""

from collections.abc import Iterable

import numpy as np
from msgspec.structs import replace

from shared.adapter import Adapter
from shared.codec import encode_manifest
from shared.heldout import HeldOut
from shared.messages import (
    Block,
    EvaluateResult,
    Evaluation,
    JobSpec,
    LogEvent,
    Manifest,
    Pacing,
    ProbeResult,
    RoundClosed,
    RoundOpened,
    SubmitJob,
    SubmitUpdate,
    Task,
    Tuning,
    UpdateKey,
    Variant,
    WalkResult,
)


def a_manifest(*, momentum: int = 0, d: int = 64, seed: int = 7) -> bytes:
    return encode_manifest(
        Manifest(
            epoch=0,
            architecture="llama",
            seed=seed,
            blocks=[Block("control", "l_out-1", [d], layer=1)],
            variants=[Variant("a" * 64, 1, "tiny.gguf")],
            d=d,
            update_rule="momentum" if momentum else "plain",
        )
    )


def a_job(
    name: str = "demo",
    *,
    rounds: int = 3,
    directions: int = 32,
    enough_devices: int = 2,
    enough_probes: int = 16,
    evaluate_every: int = 0,
    patience: int = 0,
    epochs: int = 1,
    momentum: int = 0,
    snapshot_every: int = 50,
    d: int = 64,
) -> SubmitJob:
    return SubmitJob(
        job=name,
        spec=JobSpec(
            task=Task(loss="choices", labels={"a": " a", "b": " b"}),
            tuning=Tuning(
                rounds=rounds,
                directions=directions,
                normalise="none",
                momentum=momentum,
                step=0.1,
                clip=1e6,
            ),
            pacing=Pacing(enough_devices=enough_devices, enough_probes=enough_probes),
            evaluation=Evaluation(every_rounds=evaluate_every, patience=patience),
            snapshot_every=snapshot_every,
            epochs=epochs,
        ),
        manifest=a_manifest(momentum=momentum, d=d),
    )


def a_job_of(method: str, *, rounds: int = 4, **changes: object) -> SubmitJob:
    """A small job of a method with the numbers that it wants."""
    own: dict[str, dict[str, object]] = {
        "mezo": {"final_step": 1.0},
        "fwdllm": {"final_step": 0.0, "candidates": 3, "threshold": 0.002, "most_more": 3},
        "fedkseed": {"final_step": 1.0, "local_steps": 8},
        "fedkseed-pro": {"final_step": 1.0, "local_steps": 8},
    }
    job = a_job(rounds=rounds)
    tuning = replace(job.spec.tuning, method=method, **{**own.get(method, {}), **changes})
    return replace(job, spec=replace(job.spec, tuning=tuning))


def a_walk(opened: RoundOpened, device: str, *, part: int = 0) -> SubmitUpdate:
    """A walk of eight steps, twice along four directions, that follows from its key."""
    assert opened.walk is not None
    seed = abs(hash((device, part, opened.round))) % 2**32
    chance = np.random.default_rng(seed)
    differences = chance.integers(-50_000, 50_000, 4).astype("<i4")
    sized = opened.walk.held > 0
    return SubmitUpdate(
        key=UpdateKey(opened.job, opened.epoch, opened.round, device, part),
        digest=opened.digest,
        result=WalkResult(
            ranges=[(int(chance.integers(0, 8)), 3), (int(chance.integers(16, 32)), 1)],
            differences=differences.tobytes(),
            share=int(chance.integers(1, 40)),
            steps=8,
            loss=8 << 20,
            weight=16,
            sizes=np.abs(differences).astype("<i8").tobytes() if sized else b"",
            visits=np.full(4, 2, "<u2").tobytes() if sized else b"",
        ),
        work_s=0.5,
    )


def a_probe(
    opened: RoundOpened,
    device: str,
    *,
    part: int = 0,
    first: int = 0,
    count: int = 8,
    weight: int = 4,
    digest: str | None = None,
) -> SubmitUpdate:
    """A probe update whose numbers follow from its key."""
    seed = abs(hash((device, part, opened.round, first))) % 2**32
    differences = np.random.default_rng(seed).integers(-50_000, 50_000, count).astype("<i4")
    return SubmitUpdate(
        key=UpdateKey(opened.job, opened.epoch, opened.round, device, part),
        digest=digest or opened.digest,
        result=ProbeResult(
            how="probe",
            ranges=[(first, count)],
            differences=differences.tobytes(),
            bends=np.ones(count, "<i4").tobytes(),
            loss=weight << 20,
            weight=weight,
        ),
        work_s=0.5,
    )


def an_evaluation(
    opened: RoundOpened, device: str, *, correct: int = 30, loss: float = 120.0
) -> SubmitUpdate:
    return SubmitUpdate(
        key=UpdateKey(opened.job, opened.epoch, opened.round, device, 0),
        digest=opened.digest,
        result=EvaluateResult(examples=100, correct=correct, weight=100, loss=loss),
        work_s=0.5,
    )


def judged(events: Iterable[LogEvent]) -> HeldOut:
    """What a job's log says of its versions."""
    held_out = HeldOut()
    for event in events:
        held_out.see(event)
    return held_out


def adapter_after(manifest: bytes, events: Iterable[object]) -> Adapter:
    """What any reader of the log holds: an independent fold over RoundClosed."""

    adapter = Adapter(manifest)
    for event in events:
        if isinstance(event, RoundClosed):
            adapter.apply(event.round, event.commit)
    return adapter
