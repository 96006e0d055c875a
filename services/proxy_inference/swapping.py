"""Brings about what `versions` wants: fetches a version, checks it, opens it, lets it serve.

What cannot be used is refused, and the version that serves goes on; what the world fails is tried
again. A version that is overtaken on its way is dropped for the newer one.
"""

import asyncio

from services.proxy_inference.models import Models
from services.proxy_inference.pool import Held, Pool
from services.proxy_inference.shelf import Kept, Shelf
from services.proxy_inference.versions import Version, Versions
from shared import blobs
from shared.adapter import Adapter
from shared.bus import Streams
from shared.clock import backoff_s
from shared.errors import ConfigError, EngineError, InvalidUpdate, RejectError, TransientError
from shared.logs import get
from shared.messages import Manifest

log = get("swapping")


class Swapper:
    """The one that changes which version serves."""

    def __init__(
        self, versions: Versions, shelf: Shelf, models: Models, pool: Pool, keep: int
    ) -> None:
        self.streams: Streams | None = None
        """The broker, while it can be asked."""
        self.problem = ""
        """Why the wanted version does not serve yet."""
        self.refused = 0
        self._versions = versions
        self._shelf = shelf
        self._models = models
        self._pool = pool
        self._keep = keep
        self._woken = asyncio.Event()
        self._woken.set()

    def wake(self) -> None:
        """Something changed: look again at what is wanted."""
        self._woken.set()

    async def restore(self) -> None:
        """What lies on disk is known, before any broker is asked."""
        for kept in await asyncio.to_thread(self._shelf.versions):
            self._versions.keep(kept.version, kept.spec, kept.manifest)

    async def run(self) -> None:
        """The wanted version serves as soon as it can, for ever."""
        attempt = 0
        while True:
            delay_s: float | None = None
            self._woken.clear()
            try:
                await self._bring_about()
                attempt = 0
                self.problem = ""
            except TransientError as error:
                self.problem = str(error)
                delay_s = backoff_s(attempt, first_s=0.2, cap_s=10.0)
                attempt += 1
                log.warning("version_waits", why=str(error), again_s=round(delay_s, 1))
            try:
                async with asyncio.timeout(delay_s):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def open(self, version: Version | None) -> Held:
        """A generation for a request that named it.

        Raises:
            TransientError: not now.
            EngineError, RejectError: it cannot be served.
        """
        await self._pool.room_now()
        if version is None:
            default = self._pool.default
            if default is None:
                raise TransientError("no model is loaded yet")
            weights = default.generation.weights
            return await self._pool.open(None, None, None, weights.file, asked_for=True)
        return await self._opened(version, asked_for=True)

    async def _bring_about(self) -> None:
        """Return when what is wanted serves.

        Raises:
            TransientError: it cannot yet.
        """
        while True:
            wanted, default = self._versions.wanted(), self._pool.default
            if wanted is None:
                if default is None and self._models.own is not None:
                    self._pool.serve(await self._base())
                return
            if default and default.version and default.version.digest == wanted.digest:
                return
            try:
                await self._prepare(wanted)
                await self._pool.room()
                if self._versions.wanted() != wanted:
                    continue  # overtaken
                self._pool.serve(await self._opened(wanted))
                await asyncio.to_thread(self._shelf.set_served, wanted.digest)
            except blobs.NotStored:
                if not self._versions.miss(wanted):
                    raise
                log.warning("version_not_stored", version=wanted.name)
            except (EngineError, RejectError) as error:
                self.refused += 1
                self._versions.refuse(wanted, str(error))
                log.error("version_refused", version=wanted.name, why=str(error))
            else:
                await self._tidy()

    async def _base(self) -> Held:
        """The base model alone, while nothing has been published.

        Raises:
            ConfigError: the file cannot be served.
        """
        own = self._models.own
        assert own is not None
        try:
            return await self._pool.open(None, None, None, own)
        except EngineError as error:
            raise ConfigError(str(error)) from error

    async def _prepare(self, version: Version) -> None:
        """All that the version needs is on disk and has been checked."""
        kept = await self._kept(version)
        adapter = await asyncio.to_thread(_checked, kept)
        await self._models.find(adapter.manifest.variants, self.streams)

    async def _opened(self, version: Version, *, asked_for: bool = False) -> Held:
        kept = await self._kept(version)
        adapter = await asyncio.to_thread(_checked, kept)
        manifest: Manifest = adapter.manifest
        file = await self._models.find(manifest.variants, self.streams)
        anchor = Adapter.from_bytes(kept.manifest, kept.anchor) if kept.anchor else None
        return await self._pool.open(
            version, kept.spec, adapter, file, anchor=anchor, asked_for=asked_for
        )

    async def _kept(self, version: Version) -> Kept:
        """The version from disk, or else fetched and put there."""
        kept = await asyncio.to_thread(self._shelf.load, version)
        if kept is not None:
            return kept
        spec, manifest = self._versions.spec(version.job), self._versions.manifest(version)
        if spec is None or manifest is None:
            raise InvalidUpdate(f"{version.name}: the log does not say what its numbers are")
        if self.streams is None:
            raise TransientError(f"{version.name} is not on disk, and the broker is away")
        snapshot = await blobs.load(self.streams, version.snapshot)
        of = self._versions.anchor(version)
        anchor = await blobs.load(self.streams, of) if of else b""
        kept = Kept(version, spec, manifest, snapshot, anchor)
        await asyncio.to_thread(_checked, kept)
        try:
            await asyncio.to_thread(self._shelf.put, kept)
        except OSError as error:
            log.error("version_not_kept", version=version.name, why=str(error))
        else:
            self._versions.keep(version, spec, manifest)
        return kept

    async def _tidy(self) -> None:
        """No more than so many versions of a job lie on disk."""
        serving = [held.version for held in self._pool.alive if held.version]
        for version in self._versions.surplus(self._keep, serving):
            await asyncio.to_thread(self._shelf.drop, version)
            self._versions.forget(version)


def _checked(kept: Kept) -> Adapter:
    """The version's adapter, proved by its digest.

    Raises:
        RejectError: it is not what was published.
    """
    try:
        adapter = Adapter.from_bytes(kept.manifest, kept.snapshot)
        if kept.anchor:
            Adapter.from_bytes(kept.manifest, kept.anchor)
    except ValueError as error:  # numbers cut short
        raise InvalidUpdate(f"{kept.version.name}: not a snapshot: {error}") from error
    if adapter.digest() != kept.version.digest:
        raise InvalidUpdate(
            f"{kept.version.name}: its numbers give digest {adapter.digest()[:12]}, published was "
            f"{kept.version.digest[:12]}"
        )
    return adapter
