"""Files on their way into the fleet's store and out of it, with a bar."""

import asyncio
import contextlib
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from services.console.failure import Failure
from shared import blobs, subjects
from shared.bus import Streams
from shared.errors import TransientError
from shared.messages import BlobRef

MEASURE_S = 1.0
COLUMNS = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())


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


async def download(streams: Streams, digest: str, file: Path, console: Console) -> BlobRef:
    """The blob is at `file`; what an earlier attempt got is not fetched again.

    Raises:
        Failure: it is not in the store, or the link failed.
    """
    try:
        ref = await _reference(streams, digest)
        with Bar(*COLUMNS, console=console, transient=True) as bar:
            task = bar.add_task("downloading", total=ref.size_bytes)
            await blobs.fetch(
                streams, ref, file, progress=lambda got, _: bar.update(task, completed=got)
            )
    except TransientError as error:
        raise Failure(f"the download stopped: {error}; the same command goes on with it") from error
    return ref


async def _reference(streams: Streams, digest: str) -> BlobRef:
    """The blob's size, as its last chunk in the store tells it."""
    last = max((int(subjects.last_token(one)) for one in await _chunks(streams, digest)), default=0)
    stored = await streams.get_last(subjects.BLOBS_STREAM, subjects.blob(digest, last))
    if stored is None:
        raise Failure(
            f"the store has no file {digest}; of a job's snapshots the newest and the best are kept"
        )
    return BlobRef(digest, last * blobs.CHUNK_BYTES + len(stored.data))


async def _chunks(streams: Streams, digest: str) -> set[str]:
    return await streams.subjects(subjects.BLOBS_STREAM, subjects.ALL_BLOBS.replace("*", digest, 1))


async def _measure(streams: Streams, ref: BlobRef, bar: Bar) -> None:
    """Show how much of the blob is in the store, until cancelled."""
    task = bar.add_task("uploading", total=ref.size_bytes)
    while True:
        with contextlib.suppress(TransientError):
            present = len(await _chunks(streams, ref.digest))
            bar.update(task, completed=min(present * blobs.CHUNK_BYTES, ref.size_bytes))
        await asyncio.sleep(MEASURE_S)
