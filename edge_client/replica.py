"""The engine's copy of one job's adapter: opened, moved by the log, and checked against it.

Every step compares the engine's digest with the log's, so the position is always a proven one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from edge_client.engine import Engine
from edge_client.history import Link
from edge_client.models import Models
from edge_client.rows import Rows
from edge_client.state import Position
from shared import blobs
from shared.bus import Streams
from shared.clock import Clock
from shared.codec import decode_manifest
from shared.engine.protocol import (
    Apply,
    CloseJob,
    Done,
    Opened,
    OpenJob,
    RequestUnion,
    Restore,
    Standing,
)
from shared.errors import EngineError, TransientError
from shared.logs import get
from shared.messages import BlobRef, EpochOpened, JobSpec, ModelPublished, RoundClosed
from shared.metrics import Counters

log = get("replica")

Answered = TypeVar("Answered")

ASK_S, APPLY_A_PARAMETER_S = 0.002, 1e-7
"""What a round takes the engine, by the size of its adapter, until it has been measured."""


class DigestMismatch(EngineError):
    """The engine's adapter is not the log's."""


@dataclass(frozen=True, slots=True)
class Device:
    """What all jobs of a device share; `opened` is told what the data turned out to be."""

    name: str
    rows: Rows
    threads: int
    state_dir: Path
    streams: Streams
    engine: Engine
    models: Models
    counters: Counters
    link: Link
    clock: Clock
    opened: Callable[[Opened], None]


class Replica:
    """Stands nowhere until it is opened; `moved` is called whenever it stands somewhere else."""

    def __init__(
        self,
        device: Device,
        job: str,
        moved: Callable[[], None],
    ) -> None:
        self._device = device
        self._job = job
        self._moved = moved
        self._life = -1
        self.position: Position | None = None
        self.doing = "opening the job"
        self.apply_s = 0.0
        """What applying one round takes, as a moving average; 0 until the job is open."""

    @property
    def alive(self) -> bool:
        """Whether the engine still holds what was put there."""
        return self._life == self._device.engine.life

    @property
    def round(self) -> int:
        return self.position.round if self.position else 0

    def lose(self) -> None:
        """The engine's copy is not to be used any more."""
        self._life = -1

    async def ask(self, request: RequestUnion, expected: type[Answered]) -> Answered:
        """The engine's answer, if it still holds the job.

        Raises:
            EngineLost: it does not.
            EngineError, EngineDied: as ever.
        """
        return await self._device.engine.ask(request, expected, life=self._life)

    async def open(self, spec: JobSpec, epoch: EpochOpened, sequence: int) -> None:
        """The engine holds the job where `epoch` starts: at theta = 0, or at its snapshot.

        Raises:
            EngineError: data, model or manifest cannot be used.
            TransientError: the model, or the snapshot, cannot be had now.
            DigestMismatch: the start is not what the log says.
            OSError: the disk would not take the snapshot.
        """
        device = self._device
        self.doing = "finding the model"
        manifest = decode_manifest(epoch.manifest)
        self.apply_s = self.apply_s or ASK_S + manifest.d * APPLY_A_PARAMETER_S
        model = await device.models.find(manifest.variants)
        self.doing = "loading the model"
        life = device.engine.life
        request = OpenJob(
            job=self._job,
            manifest=epoch.manifest,
            task=spec.task,
            model=str(model),
            data=device.rows.data,
            heldout=device.rows.heldout,
            device=device.name,
            threads=device.threads,
        )
        opened = await device.engine.ask(request, Opened, life=life)
        self._life = life
        device.opened(opened)
        standing = Standing(round=0, digest=opened.digest)
        try:
            if epoch.start is not None:
                standing = await self._restored(epoch.start)
            self._stand(sequence, epoch.epoch, standing, epoch.digest)
        except BaseException:
            self.lose()  # it stands where the log never was, and `position` is of the epoch before
            raise
        log.info("job_opened", job=self._job, epoch=epoch.epoch, rows=opened.rows, model=model.name)

    async def restore(self, snapshot: ModelPublished, sequence: int) -> bool:
        """Stand at `snapshot`; False where it cannot be had (the store keeps only two).

        Raises:
            EngineError: it is no snapshot of this job.
            DigestMismatch: it is not what the log says.
            OSError: the disk would not take it.
        """
        try:
            standing = await self._restored(snapshot.snapshot)
        except TransientError as error:
            log.warning("snapshot_not_fetched", job=self._job, why=str(error))
            return False
        self._stand(sequence, snapshot.epoch, standing, snapshot.digest)
        self._device.counters.add("catch_up_snapshots")
        return True

    async def apply(self, closed: RoundClosed, sequence: int) -> None:
        """Stand after the close of a round.

        Raises:
            DigestMismatch: the engine's adapter went elsewhere.
            EngineError: the engine is not there any more.
        """
        device = self._device
        began = device.clock.now()
        request = Apply(job=self._job, round=closed.round, commit=closed.commit)
        standing = await self.ask(request, Standing)
        self.apply_s += (device.clock.now() - began - self.apply_s) / 3
        self._stand(sequence, closed.epoch, standing, closed.digest)

    def read(self, sequence: int) -> None:
        """The log has been read up to `sequence`, and the adapter did not move."""
        if self.position is not None:
            self.position = replace(self.position, sequence=sequence)

    async def close(self) -> None:
        """The engine has forgotten the job."""
        if self.alive:
            try:
                await self.ask(CloseJob(job=self._job), Done)
            except EngineError as error:
                log.warning("close_failed", job=self._job, why=str(error))
        self.lose()

    async def _restored(self, snapshot: BlobRef) -> Standing:
        """Where the engine stands now that it has taken `snapshot`."""
        device = self._device
        self.doing = "fetching a snapshot"
        path = device.state_dir / "snapshots" / f"{self._job}.snapshot"
        began = device.clock.now()
        await blobs.fetch(device.streams, snapshot, path)
        device.link.moved(snapshot.size_bytes, device.clock.now() - began)
        standing = await self.ask(Restore(job=self._job, path=str(path)), Standing)
        _remove(path)
        return standing

    def _stand(self, sequence: int, epoch: int, standing: Standing, digest: str) -> None:
        if standing.digest != digest:
            self._device.counters.add("digest_mismatches")
            raise DigestMismatch(
                f"job {self._job}: after round {standing.round} the adapter is "
                f"{standing.digest[:12]}, the log says {digest[:12]}; is Seedwire's version on "
                "this device the fleet's?"
            )
        self.position = Position(sequence, epoch, standing.round, standing.digest)
        self.doing = f"at round {standing.round}"
        self._moved()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
