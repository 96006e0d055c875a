"""Where a job's model is: among the device's own files, at its address, or in stream BLOBS.

A file is what its SHA-256 says, never what it is called. Downloads go on where they broke off and
come one at a time.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from edge_client.downloading import download, size_of
from shared import blobs
from shared.bus import Streams
from shared.errors import EngineError, TransientError
from shared.logs import get
from shared.messages import BlobRef, Variant
from shared.metrics import Counters

_PIECE_BYTES = 1024 * 1024

log = get("models")


class Hashed(msgspec.Struct, frozen=True):
    """A file's digest, good for as long as size and time of change are the same."""

    size_bytes: int
    changed_ns: int
    digest: str


class Models:
    """The models this device has or can get."""

    def __init__(
        self, own: Sequence[str], state_dir: Path, streams: Streams, counters: Counters
    ) -> None:
        self._own = [Path(path).expanduser() for path in own]
        self._fetched = state_dir / "models"
        self._cache_path = state_dir / "digests.json"
        self._streams = streams
        self._counters = counters
        self._cache: dict[str, Hashed] = {}
        self._hashing = asyncio.Lock()
        self._downloading = asyncio.Lock()
        with contextlib.suppress(OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            data = self._cache_path.read_bytes()
            self._cache = msgspec.json.decode(data, type=dict[str, Hashed])

    def known(self) -> list[str]:
        """The digests of the files that have been read so far."""
        return sorted({self._known(path) for path in self._files()} - {""})

    async def index(self) -> bool:
        """All files have been read, which may take minutes once; whether any was new."""
        before = self.known()
        for path in self._files():
            await self._digest(path)
        return self.known() != before

    async def find(self, variants: Sequence[Variant]) -> Path:
        """A file that is one of `variants`: an own one, or else the smallest, fetched.

        Raises:
            EngineError: the disk would not take it.
            TransientError: none can be had now; says what was tried. What came is kept.
        """
        own = await self._among_own(variants)
        if own is not None:
            return own
        variant = min(variants, key=lambda one: one.size_bytes)
        async with self._downloading:
            try:
                return await self._fetch(variant)
            except OSError as error:
                raise EngineError(
                    f"model {variant.name} cannot be stored: {error.strerror}; "
                    f"free {variant.size_bytes} bytes at {self._fetched}"
                ) from error

    async def _among_own(self, variants: Sequence[Variant]) -> Path | None:
        """Only files of the right size are read."""
        sizes = {variant.size_bytes for variant in variants}
        wanted = {variant.digest for variant in variants}
        for path in self._files():
            with contextlib.suppress(OSError):
                if path.stat().st_size in sizes and await self._digest(path) in wanted:
                    return path
        return None

    async def _fetch(self, variant: Variant) -> Path:
        target = self._fetched / f"{variant.digest}.gguf"
        self._fetched.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        resumed = size_of(part) > 0
        tried, there = [self._hint(variant)], False
        try:
            if variant.url and variant.url.startswith(("http://", "https://")):
                await self._from_address(variant, variant.url, part, target)
                there = True
            elif variant.url:
                return await self._from_path(variant, variant.url)
        except (EngineError, TransientError) as error:
            tried.append(str(error))
        if not there:
            ref = BlobRef(variant.digest, variant.size_bytes)
            try:
                await blobs.fetch(self._streams, ref, target)
            except TransientError as error:
                why = "; ".join([*tried, str(error)])
                raise TransientError(
                    f"model {variant.name} (SHA-256 {variant.digest[:12]}, {variant.size_bytes} "
                    f"bytes) cannot be had: {why}; or put the file under `models`",
                    delay_s=error.delay_s,
                ) from error
        self._remember(target, _seen(target), variant.digest)
        self._counters.add("model_downloads")
        self._counters.add("model_resumes", int(resumed))
        log.info("model_fetched", model=variant.name, size_bytes=variant.size_bytes)
        return target

    async def _from_address(self, variant: Variant, url: str, part: Path, target: Path) -> None:
        await download(url, part, variant.size_bytes)
        found = await _sha256(part)
        if found != variant.digest:
            await asyncio.to_thread(part.unlink)
            raise EngineError(f"{url} is another file (SHA-256 {found[:12]})")
        await asyncio.to_thread(part.rename, target)

    async def _from_path(self, variant: Variant, url: str) -> Path:
        path = Path(url.removeprefix("file://"))
        if size_of(path) != variant.size_bytes:
            raise EngineError(f"{path} is no file of {variant.size_bytes} bytes here")
        if await self._digest(path) != variant.digest:
            raise EngineError(f"{path} is another file of the same length")
        return path

    def _hint(self, variant: Variant) -> str:
        """What is wrong with an own file that bears the model's name."""
        for path in self._files():
            if path.name == variant.name:
                have = path.stat().st_size
                what = "truncated" if have < variant.size_bytes else "another file"
                return f"{path} is {what} ({have} bytes)"
        return "not among `models`"

    def _files(self) -> Iterator[Path]:
        for place in (*self._own, self._fetched):
            if place.is_dir():
                yield from sorted(path for path in place.rglob("*.gguf") if path.is_file())
            elif place.is_file():
                yield place

    async def _digest(self, path: Path) -> str:
        """SHA-256 of a file, kept between runs; empty where it cannot be read."""
        async with self._hashing:
            digest = self._known(path)
            if not digest:
                try:
                    seen = _seen(path)  # before: a file still being written is read again
                    digest = await _sha256(path)
                except OSError as error:
                    log.warning("model_unreadable", path=str(path), error=str(error))
                else:
                    self._remember(path, seen, digest)
            return digest

    def _known(self, path: Path) -> str:
        """The digest of a file that was read before and has not changed; empty for another."""
        known = self._cache.get(str(path))
        with contextlib.suppress(OSError):
            if known is not None and _seen(path) == (known.size_bytes, known.changed_ns):
                return known.digest
        return ""

    def _remember(self, path: Path, seen: tuple[int, int], digest: str) -> None:
        self._cache[str(path)] = Hashed(*seen, digest)
        with contextlib.suppress(OSError):  # a cache: without it the file is read again
            self._cache_path.write_bytes(msgspec.json.encode(self._cache))


def _seen(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


async def _sha256(path: Path) -> str:
    """In threads, a piece at a time, so that it can be cancelled between two."""
    sha = hashlib.sha256()
    with path.open("rb") as file:

        def piece() -> bool:
            data = file.read(_PIECE_BYTES)
            sha.update(data)
            return bool(data)

        while await asyncio.to_thread(piece):
            pass
    return sha.hexdigest()
