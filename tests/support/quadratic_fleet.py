"""A job over the quadratic engine, and its devices: what a method does to them can be computed."""

import json
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from shared.codec import encode_manifest
from shared.engine.job import Job
from shared.engine.probing import probe
from shared.engine.protocol import OpenJob, Probe, Walk
from shared.engine.walking import walk
from shared.messages import (
    Block,
    Evaluation,
    JobSpec,
    Manifest,
    Pacing,
    ProbeResult,
    RoundOpened,
    SubmitJob,
    SubmitUpdate,
    Task,
    Tuning,
    UpdateKey,
    Variant,
    WalkResult,
)
from shared.messages.jobs import Distribution
from tests.support.quadratic import QuadraticEngine, centre
from tests.support.runs import Run

D, SEED = 24, 7
TASK = Task("choices", "{text} is", {"up": " alpha", "down": " beta"})
PLAIN: dict[str, object] = {"normalise": "none", "how": "probe"}


def a_manifest(distribution: Distribution = "gauss8", d: int = D) -> bytes:
    """Two control vectors of d / 2 entries each."""
    blocks = [Block("control", "", [d // 2], layer=layer) for layer in (1, 2)]
    variants = [Variant("0" * 64, 1, "quadratic")]
    return encode_manifest(Manifest(0, "fake", SEED, blocks, variants, d, distribution))


def a_submission(
    method: str, devices: int, probes: int, manifest: bytes | None = None, **tuning: object
) -> SubmitJob:
    """A job that `method` tunes by `tuning`; a round waits for so many devices and probes."""
    spec = JobSpec(
        task=TASK,
        tuning=replace(Tuning(method=method), **{**PLAIN, **tuning}),
        pacing=Pacing(enough_devices=devices, enough_probes=probes),
        evaluation=Evaluation(every_rounds=0),
    )
    return SubmitJob(job="demo", spec=spec, manifest=manifest or a_manifest())


class Device:
    """The engine's side of a device, in step with a run's log."""

    def __init__(self, name: str, folder: Path, rows: int, manifest: bytes | None = None) -> None:
        data = folder / f"{name}.jsonl"
        lines = [{"text": f"word{n} {name}", "label": ["up", "down"][n % 2]} for n in range(rows)]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        request = OpenJob(
            "demo", manifest or a_manifest(), TASK, "q", str(data), str(data), device=name
        )
        self.name = name
        self.job = Job(request, QuadraticEngine())
        self.followed = 0

    @property
    def centres(self) -> NDArray[np.float64]:
        """What each row wants: (rows, d)."""
        examples = self.job.examples(self.job.rows_of(0))
        return np.array([centre(example, self.job.layout.d) for example in examples])

    def follow(self, run: Run) -> None:
        """Move as the run's closes say, to the digest of each."""
        for close in run.closes()[self.followed :]:
            self.job.adapter.apply(close.round, close.commit)
            assert self.job.adapter.digest() == close.digest
            self.followed += 1

    def probes(self, opened: RoundOpened, ranges: list[tuple[int, int]]) -> SubmitUpdate:
        """What it measures of a round."""
        request = Probe(
            "demo",
            opened.round,
            opened.stream_round,
            opened.how,
            ranges,
            opened.eps,
            opened.batch_rows,
            opened.scope,
            opened.digest,
            opened.batch_round,
        )
        return self._update(opened, probe(self.job, request))

    def walks(self, opened: RoundOpened) -> SubmitUpdate:
        """Where it goes in a round of walks."""
        assert opened.walk is not None
        request = Walk(
            "demo",
            opened.round,
            0,
            opened.stream_round,
            opened.directions,
            opened.walk,
            opened.eps,
            opened.batch_rows,
            opened.scope,
            opened.digest,
        )
        return self._update(opened, walk(self.job, request))

    def _update(self, opened: RoundOpened, result: ProbeResult | WalkResult) -> SubmitUpdate:
        key = UpdateKey("demo", 0, opened.round, self.name, 0)
        return SubmitUpdate(key=key, digest=opened.digest, result=result, work_s=0.1)
