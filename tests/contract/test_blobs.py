"""Blobs over both brokers: idempotent, resumable, never silently wrong."""

from pathlib import Path

import pytest

from shared import blobs, subjects
from shared.blobs import CHUNK_BYTES
from shared.bus import Link, Stored
from shared.errors import TransientError
from shared.log import ensure_streams
from shared.messages import BlobRef
from tests.support.hubs import MemoryHub

SIZE = 5 * CHUNK_BYTES + 1000


def a_file(folder: Path, size: int = SIZE) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(b"".join(n.to_bytes(4, "big") for n in range(size // 4)))
    return path


@pytest.fixture
async def store(bus: Link) -> Link:
    await ensure_streams(bus)
    return bus


@pytest.mark.parametrize("size", [0, 4, CHUNK_BYTES, SIZE])
async def test_what_was_put_is_fetched(store: Link, tmp_path: Path, size: int) -> None:
    source = a_file(tmp_path, size)
    ref = await blobs.put(store, source)
    assert ref == await blobs.put(store, source.read_bytes())
    seen: list[tuple[int, int]] = []

    def progress(done: int, whole: int) -> None:
        seen.append((done, whole))

    await blobs.fetch(store, ref, tmp_path / "to" / "copy", progress=progress)
    assert (tmp_path / "to" / "copy").read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["copy"]
    assert seen[-1] == (size, size)
    assert await blobs.load(store, ref) == source.read_bytes()
    assert await store.last_sequence(subjects.BLOBS_STREAM) == -(-size // CHUNK_BYTES)
    await blobs.delete(store, ref)
    assert await store.subjects(subjects.BLOBS_STREAM, subjects.ALL_BLOBS) == set()


async def test_an_interrupted_download_goes_on_where_it_stopped(
    store: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copy = a_file(tmp_path), tmp_path / "copy"
    ref = await blobs.put(store, source)
    fetched: list[str] = []
    get_last = store.get_last

    async def through_a_bad_link(
        stream: str, subject: str, *, timeout_s: float = 1.0
    ) -> Stored | None:
        if subject == subjects.blob(ref.digest, 4) and len(fetched) == 4:
            raise TransientError("the link is down")
        fetched.append(subject)
        return await get_last(stream, subject, timeout_s=timeout_s)

    monkeypatch.setattr(store, "get_last", through_a_bad_link)
    with pytest.raises(TransientError, match="link is down"):
        await blobs.fetch(store, ref, copy)
    assert not copy.exists()
    with (tmp_path / "copy.part").open("ab") as part:
        part.write(b"a torn write")
    fetched.append("the second attempt")
    await blobs.fetch(store, ref, copy)
    assert copy.read_bytes() == source.read_bytes()
    after = fetched[fetched.index("the second attempt") + 1 :]
    assert after == [subjects.blob(ref.digest, n) for n in (4, 5)]


async def test_a_torn_upload_is_named_and_completed(store: Link, tmp_path: Path) -> None:
    source = a_file(tmp_path)
    ref = await blobs.put(store, source)
    await store.purge(subjects.BLOBS_STREAM, subjects.blob(ref.digest, 3))
    with pytest.raises(TransientError, match=r"chunk 3 of 6 of blob .* upload it again"):
        await blobs.fetch(store, ref, tmp_path / "copy")
    before = await store.last_sequence(subjects.BLOBS_STREAM)
    await blobs.put(store, source)
    assert await store.last_sequence(subjects.BLOBS_STREAM) == before + 1
    await blobs.fetch(store, ref, tmp_path / "copy")


async def test_a_damaged_blob_is_never_kept(store: Link, tmp_path: Path) -> None:
    ref = await blobs.put(store, a_file(tmp_path))
    for damaged in (bytes(CHUNK_BYTES), b"short"):
        subject = subjects.blob(ref.digest, 1)
        await store.append(subject, damaged, stream=subjects.BLOBS_STREAM)
        with pytest.raises(TransientError, match=ref.digest):
            await blobs.fetch(store, ref, tmp_path / "copy")
        with pytest.raises(TransientError, match=ref.digest):
            await blobs.load(store, ref)
    assert not (tmp_path / "copy").exists()


async def test_a_part_of_another_file_does_not_survive(
    memory_hub: MemoryHub, tmp_path: Path
) -> None:
    bus = await memory_hub.connect("bus")
    await ensure_streams(bus)
    source = a_file(tmp_path)
    ref = await blobs.put(bus, source)
    (tmp_path / "copy.part").write_bytes(bytes(SIZE))
    with pytest.raises(TransientError):
        await blobs.fetch(bus, BlobRef(ref.digest, ref.size_bytes), tmp_path / "copy")
    await blobs.fetch(bus, ref, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
