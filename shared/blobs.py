"""Big things by digest: chunks in stream BLOBS, put once, fetched over links that fail.

Chunk n of a blob is the one message of subject `blob.<digest>.<n>`.
"""

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from shared import subjects
from shared.bus import Streams
from shared.errors import TransientError
from shared.messages import BlobRef

CHUNK_BYTES = 256 * 1024
AT_ONCE = 4
CHUNK_TIMEOUT_S = 60.0
"""Patience for one chunk: what is in flight may share a link of 140 kbit/s."""

Progress = Callable[[int, int], None]
"""(bytes so far, bytes in all)"""

Result = TypeVar("Result")


class NotStored(TransientError):
    """The store has not all of a blob: it was removed, or is yet to come."""


async def put(streams: Streams, source: bytes | Path) -> BlobRef:
    """The blob is in the store, whole; chunks that are there already are not sent again."""
    ref = await asyncio.to_thread(reference, source)
    present = await streams.subjects(subjects.BLOBS_STREAM, _subjects(ref))
    missing = [n for n in range(_chunks(ref)) if subjects.blob(ref.digest, n) not in present]
    for some in _groups(missing):
        await _together(_put_chunk(streams, ref, source, index) for index in some)
    return ref


async def fetch(
    streams: Streams, ref: BlobRef, path: Path, *, progress: Progress | None = None
) -> None:
    """The blob is at `path`. What was fetched is kept beside it, and a later call goes on there.

    Raises:
        TransientError: the link failed, or a chunk is damaged, or missing (NotStored): its text
            says which.
    """
    part = path.with_name(path.name + ".part")
    await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
    first = await asyncio.to_thread(_whole_chunks, part, ref)
    if progress is not None:
        progress(min(first * CHUNK_BYTES, ref.size_bytes), ref.size_bytes)
    async with aclosing(_chunks_from(streams, ref, first)) as chunks:
        async for index, data in chunks:
            await asyncio.to_thread(_write_at, part, index * CHUNK_BYTES, data)
            if progress is not None:
                progress(index * CHUNK_BYTES + len(data), ref.size_bytes)
    if await asyncio.to_thread(reference, part) != ref:
        await asyncio.to_thread(part.unlink)
        raise _damaged(ref)
    await asyncio.to_thread(_keep, part, path)


async def load(streams: Streams, ref: BlobRef) -> bytes:
    """A small blob, in memory.

    Raises:
        TransientError: as `fetch`.
    """
    async with aclosing(_chunks_from(streams, ref, 0)) as chunks:
        data = b"".join([data async for _, data in chunks])
    if await asyncio.to_thread(reference, data) != ref:
        raise _damaged(ref)
    return data


async def delete(streams: Streams, ref: BlobRef) -> None:
    """Nothing of the blob is in the store."""
    await streams.purge(subjects.BLOBS_STREAM, _subjects(ref))


def reference(source: bytes | Path) -> BlobRef:
    """Digest and size of bytes or of a file, which is not loaded whole."""
    if isinstance(source, bytes):
        return BlobRef(hashlib.sha256(source).hexdigest(), len(source))
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return BlobRef(digest, file.tell())


async def _put_chunk(streams: Streams, ref: BlobRef, source: bytes | Path, index: int) -> None:
    data = await asyncio.to_thread(_read_at, source, index * CHUNK_BYTES)
    subject = subjects.blob(ref.digest, index)
    await streams.append(subject, data, stream=subjects.BLOBS_STREAM)


async def _chunks_from(
    streams: Streams, ref: BlobRef, first: int
) -> AsyncGenerator[tuple[int, bytes], None]:
    """Every chunk from `first` on, in order, a few in flight at a time."""
    for some in _groups(range(first, _chunks(ref))):
        got = await _together(_chunk(streams, ref, index) for index in some)
        for index, data in zip(some, got, strict=True):
            yield index, data


async def _chunk(streams: Streams, ref: BlobRef, index: int) -> bytes:
    stored = await streams.get_last(
        subjects.BLOBS_STREAM, subjects.blob(ref.digest, index), timeout_s=CHUNK_TIMEOUT_S
    )
    if stored is None:
        raise NotStored(
            f"chunk {index} of {_chunks(ref)} of blob {ref.digest} is not in the store: upload it "
            "again (`seedwire blob put FILE`)",
            delay_s=10.0,
        )
    if len(stored.data) != min(CHUNK_BYTES, ref.size_bytes - index * CHUNK_BYTES):
        raise _damaged(ref)
    return stored.data


async def _together(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """What all calls return; the first to fail cancels the others."""

    async def call(awaitable: Awaitable[Result]) -> Result:
        return await awaitable

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call(one)) for one in calls]
    except ExceptionGroup as group:
        raise group.exceptions[0] from group
    return [task.result() for task in tasks]


def _groups(indices: Iterable[int]) -> list[list[int]]:
    whole = list(indices)
    return [whole[at : at + AT_ONCE] for at in range(0, len(whole), AT_ONCE)]


def _subjects(ref: BlobRef) -> str:
    return subjects.ALL_BLOBS.replace("*", ref.digest, 1)


def _chunks(ref: BlobRef) -> int:
    return -(-ref.size_bytes // CHUNK_BYTES)


def _whole_chunks(part: Path, ref: BlobRef) -> int:
    """How many whole chunks `part` begins with; it holds nothing else when this returns."""
    with part.open("ab") as file:
        whole = min(file.tell() // CHUNK_BYTES, _chunks(ref))
        file.truncate(whole * CHUNK_BYTES)
    return whole


def _read_at(source: bytes | Path, offset: int) -> bytes:
    if isinstance(source, bytes):
        return source[offset : offset + CHUNK_BYTES]
    with source.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def _write_at(part: Path, offset: int, data: bytes) -> None:
    with part.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _keep(part: Path, path: Path) -> None:
    """`path` is `part`, on disk, whatever happens next."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _damaged(ref: BlobRef) -> TransientError:
    return TransientError(
        f"what the store has as blob {ref.digest} is not that: delete it there and upload it "
        "again (`seedwire blob put FILE`)",
        delay_s=10.0,
    )
