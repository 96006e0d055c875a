"""Where a base model's file is: the one that was named, or fetched from the fleet by its digest."""

import asyncio
from collections.abc import Sequence

from services.proxy_inference.shelf import ModelFile, Shelf
from shared import blobs
from shared.bus import Streams
from shared.errors import ConfigError, EngineError, TransientError
from shared.logs import get
from shared.messages import BlobRef, Variant

log = get("models")


class Models:
    """The GGUF files at hand."""

    def __init__(self, shelf: Shelf, own: ModelFile | None) -> None:
        self.own = own
        self._shelf = shelf

    @classmethod
    async def at(cls, shelf: Shelf, named: str) -> "Models":
        """With the file that `named` names, if any.

        Raises:
            ConfigError: it cannot be read.
        """
        if not named:
            return cls(shelf, None)
        try:
            own = await asyncio.to_thread(shelf.file, named)
        except OSError as error:
            raise ConfigError(
                f"--model {named}: cannot be read: {error.strerror}; name a GGUF file"
            ) from error
        return cls(shelf, own)

    async def find(self, variants: Sequence[Variant], streams: Streams | None) -> ModelFile:
        """A file that is one of `variants`.

        Raises:
            TransientError: none can be had now; what came is kept, the next call goes on.
            EngineError: the disk would not take it.
        """
        digests = {variant.digest for variant in variants}
        if self.own is not None and self.own.digest in digests:
            return self.own
        for digest in sorted(digests):
            path = self._shelf.models / f"{digest}.gguf"
            if path.exists():  # it got its name when its digest had been checked
                return ModelFile(path, digest)
        variant = min(variants, key=lambda one: one.size_bytes)
        if streams is None:
            raise TransientError(f"model {variant.name} is not here, and the broker is away")
        path = self._shelf.models / f"{variant.digest}.gguf"
        log.info("model_fetching", name=variant.name, size_bytes=variant.size_bytes)
        try:
            await blobs.fetch(streams, BlobRef(variant.digest, variant.size_bytes), path)
        except OSError as error:
            raise EngineError(
                f"model {variant.name} cannot be stored: {error.strerror}; free "
                f"{variant.size_bytes} bytes at {path.parent}, or give --model"
            ) from error
        except TransientError as error:
            raise TransientError(
                f"model {variant.name}: {error}; or give its file with --model",
                delay_s=error.delay_s,
            ) from error
        return ModelFile(path, variant.digest)
