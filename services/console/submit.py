"""A job on its way: look into the model, build the manifest, upload, ask the aggregator."""

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from services.console.client import ask
from services.console.failure import Failure, Usage
from services.console.manifest import manifest
from services.console.spec import Wanted
from shared import blobs, subjects
from shared.bus import Link, Streams
from shared.codec import MAX_MESSAGE_BYTES, encode, encode_manifest
from shared.engine.process import EngineProcess
from shared.engine.protocol import Facts, Inspect
from shared.errors import TransientError
from shared.messages import BlobRef, JobAccepted, Manifest, SubmitJob, Variant

INSPECT_S = 120.0
MEASURE_S = 1.0
COLUMNS = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())


@dataclass(frozen=True, slots=True)
class Submission:
    """What the command line asks for."""

    job: str
    model: Path
    wanted: Wanted
    upload: bool = True
    url: str | None = None
    engine: Literal["llama", "fake"] = "llama"

    def check(self) -> None:
        """Find what no broker or engine is needed to refuse.

        Raises:
            Usage: says which option.
        """
        if not subjects.NAME.match(self.job):
            raise Usage(f"--name {self.job!r}: use 1 to 64 of A-Z a-z 0-9 _ -")
        if not self.model.is_file():
            raise Usage(f"--model {self.model}: there is no such file")


async def submit(bus: Link, submission: Submission, console: Console) -> None:
    """The job is accepted, and its model in the blob store.

    Raises:
        Failure: the model cannot carry it, the upload failed, or the aggregator refused.
    """
    facts = await inspect(submission)
    task = submission.wanted.spec.task
    ref = await digest(submission.model, console)
    variant = Variant(ref.digest, ref.size_bytes, submission.model.name[:200], submission.url)
    made = manifest(
        facts,
        submission.wanted.adapter,
        labels=task.labels,
        variant=variant,
        seed=secrets.randbits(63),
        momentum=submission.wanted.spec.tuning.momentum > 0,
    )
    request = SubmitJob(
        job=submission.job, spec=submission.wanted.spec, manifest=encode_manifest(made)
    )
    if len(encode(request)) > MAX_MESSAGE_BYTES:
        raise Failure("the job's settings are too large: fewer allow_devices or labels")
    if submission.upload:
        await upload(bus, submission.model, console)
    accepted = await ask(bus, subjects.JOB_SUBMIT, request, JobAccepted)
    console.print(described(facts, made, task.labels), highlight=False, soft_wrap=True)
    console.print(f"job {accepted.job} accepted; see `seedwire job watch {accepted.job}`")


async def inspect(submission: Submission) -> Facts:
    """What the model is, from the engine's child.

    Raises:
        EngineError: it cannot be read or is not supported.
    """
    engine = EngineProcess(submission.engine)
    task = submission.wanted.spec.task
    question = Inspect(str(submission.model), list(task.labels.values()), task.template)
    try:
        facts = await engine.ask(question, timeout_s=INSPECT_S)
    finally:
        await engine.close()
    if not isinstance(facts, Facts):
        raise Failure(f"the engine answered a {type(facts).__name__}")
    return facts


def described(facts: Facts, made: Manifest, labels: dict[str, str]) -> str:
    """What will be tuned, in a few lines."""
    kinds = sorted({block.kind for block in made.blocks})
    lines = [
        f"model: {facts.architecture}, {facts.parameters:,} parameters, "
        f"{made.variants[0].size_bytes:,} bytes",
        f"adapter: {made.d:,} parameters in {len(made.blocks)} blocks ({', '.join(kinds)})",
    ]
    if labels:
        pairs = zip(labels.items(), facts.tokens, strict=True)
        words = [f"{label} as {word!r} (token {token})" for (label, word), token in pairs]
        lines.append(f"labels: {', '.join(words)}")
    return "\n".join(lines)


async def digest(file: Path, console: Console) -> BlobRef:
    """The file's digest and size."""
    with console.status(f"reading {file.name}"):
        return await asyncio.to_thread(blobs.reference, file)


async def upload(streams: Streams, file: Path, console: Console) -> BlobRef:
    """The file is in the blob store; what an earlier attempt left there is not sent again.

    Raises:
        Failure: the link failed.
    """
    ref = await digest(file, console)
    failed: TransientError | None = None
    with Bar(*COLUMNS, console=console, transient=True) as bar:
        async with asyncio.TaskGroup() as tasks:
            meter = tasks.create_task(_measure(streams, ref, bar))
            try:
                await blobs.put(streams, file)
            except TransientError as error:
                failed = error
            meter.cancel()
    if failed is not None:
        raise Failure(f"the upload stopped: {failed}; the same command goes on with it") from failed
    return ref


async def _measure(streams: Streams, ref: BlobRef, bar: Bar) -> None:
    """Show how much of the blob is in the store, until cancelled."""
    task = bar.add_task("uploading", total=ref.size_bytes)
    chunks = subjects.ALL_BLOBS.replace("*", ref.digest, 1)
    while True:
        with contextlib.suppress(TransientError):
            present = len(await streams.subjects(subjects.BLOBS_STREAM, chunks))
            bar.update(task, completed=min(present * blobs.CHUNK_BYTES, ref.size_bytes))
        await asyncio.sleep(MEASURE_S)
