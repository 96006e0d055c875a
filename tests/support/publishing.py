"""Versions of a job, published as the aggregator publishes them: to the real log and store."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared import blobs, subjects
from shared.adapter import UNIT, Adapter
from shared.bus import Link
from shared.codec import encode_manifest
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.messages import (
    Block,
    EpochOpened,
    JobOpened,
    JobSpec,
    Manifest,
    ModelPublished,
    Task,
    Variant,
)


def a_manifest(model: Path, architecture: str, blocks: list[Block], *, epoch: int = 0) -> Manifest:
    """A manifest of `blocks` over the GGUF file `model`."""
    ref = blobs.reference(model)
    sizes = [int(np.prod(block.shape)) for block in blocks]
    return Manifest(
        epoch=epoch,
        architecture=architecture,
        seed=11,
        blocks=blocks,
        variants=[Variant(ref.digest, ref.size_bytes, model.name)],
        d=sum(sizes),
    )


@dataclass
class Publisher:
    """The one writer of a test's log."""

    link: Link
    writer: LogWriter
    manifests: dict[str, bytes] = field(default_factory=dict[str, bytes])

    @classmethod
    async def on(cls, link: Link) -> "Publisher":
        await ensure_streams(link)
        return cls(link, await LogWriter.open(link, subjects.LOG_STREAM))

    async def open(
        self,
        job: str,
        manifest: Manifest,
        task: Task | None = None,
        anchor: NDArray[np.float64] | None = None,
    ) -> None:
        """The job is open, its adapter at zero; `anchor` (d,) is what it is measured against."""
        data = encode_manifest(manifest)
        self.manifests[job] = data
        spec = JobSpec(task=task or Task(loss="tokens"))
        await self.writer.append(job, JobOpened(job=job, spec=spec))
        digest = Adapter(data).digest()
        opened = EpochOpened(job=job, epoch=manifest.epoch, manifest=data, digest=digest)
        if anchor is not None:
            held = await blobs.put(self.link, self._at(job, anchor).to_bytes())
            opened = msgspec.structs.replace(opened, anchor=held)
        await self.writer.append(job, opened)

    async def publish(
        self, job: str, round: int, values: NDArray[np.float64], *, digest: str = ""
    ) -> Adapter:
        """The adapter at `values` (d,) is published; `digest` pretends to another one."""
        adapter = self._at(job, values)
        adapter.round = round
        published = ModelPublished(
            job=job,
            epoch=adapter.manifest.epoch,
            round=round,
            digest=digest or adapter.digest(),
            snapshot=await blobs.put(self.link, adapter.to_bytes()),
        )
        await self.writer.append(job, published)
        return adapter

    def _at(self, job: str, values: NDArray[np.float64]) -> Adapter:
        adapter = Adapter(self.manifests[job])
        adapter.theta = np.round(values / UNIT).astype(np.int32)
        return adapter
