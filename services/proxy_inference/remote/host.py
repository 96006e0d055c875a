"""The large model's server, as the pool knows a large model: what small models may steer."""

import hashlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from services.proxy_inference.ensemble.counts import Counts
from services.proxy_inference.generation import Generation, Weights, steering
from services.proxy_inference.remote import link as links
from services.proxy_inference.remote.bridge import Bridge
from services.proxy_inference.remote.capabilities import MOST, Capabilities
from services.proxy_inference.remote.client import RemoteLarge, examined, named
from services.proxy_inference.remote.ensemble import RemoteEnsemble
from services.proxy_inference.remote.link import PATIENT, Link, Patience
from services.proxy_inference.remote.spelling import Spelling
from services.proxy_inference.speaking import Room
from shared.adapter import Adapter
from shared.errors import ConfigError, EngineError


class RemoteHost:
    """A server, reached but not yet compared with any small model. Use `hosted`."""

    def __init__(self, link: Link, model: str, bridge: Bridge, most: int) -> None:
        self.name = model or link.url
        self.digest = hashlib.sha256(f"{link.url}\n{model}".encode()).hexdigest()
        """Of its address and name: what lies behind them cannot be seen."""
        self.counts = Counts()
        self._link = link
        self._model = model
        self._bridge = bridge
        self._most = most
        self._found: dict[str, Capabilities] = {}
        """By the digest of the small model it was compared with."""

    @property
    def retries(self) -> int:
        """Requests that had to be sent again."""
        return self._link.retries

    def check(self, small: Weights) -> Capabilities:
        """What the server can do, its tokens being those of `small`; not for the event loop.

        Raises:
            EngineError: it cannot be steered by `small`, or not at all; names the mend.
        """
        found = self._found.get(small.digest)
        if found is None:
            spelling = Spelling(small.vocabulary)
            work = examined(self._link, spelling, self._model, most=self._most)
            try:
                found = self._bridge.end(self._bridge.begin(work))
            except ConfigError as error:
                raise EngineError(str(error)) from error
            self._found[small.digest] = found
        return found

    def over(
        self, small: Weights, adapter: Adapter | None, anchor: Adapter | None, room: Room
    ) -> RemoteEnsemble:
        """The large model, steered by `adapter` over `small`, where there is one.

        Raises:
            EngineError: they do not go together, or there is no memory.
        """
        large = RemoteLarge(self._link, self.check(small), Spelling(small.vocabulary))
        tuned = None if adapter is None else steering(small, adapter, room)
        try:
            base = Generation(small, anchor, room)
        except EngineError:
            if tuned is not None:
                tuned.close()
            raise
        return RemoteEnsemble(large, self._bridge, tuned, base, self.counts)

    def stop(self) -> None:
        """Whoever waits for the server gets an EngineError."""
        self._bridge.stop()

    def close(self) -> None:
        """Nothing is held: the link belongs to `hosted`."""


@asynccontextmanager
async def hosted(
    url: str,
    *,
    name: str = "",
    key: str = "",
    most: int = MOST,
    at_once: int = 16,
    patience: Patience = PATIENT,
) -> AsyncGenerator[RemoteHost]:
    """The server at `url`, which answers; `name` is what it calls the model, if it has several.

    Raises:
        ConfigError: it does not answer, or has no such model; names the mend.
    """
    async with links.opened(url, key, at_once=at_once, patience=patience) as link:
        host = RemoteHost(link, await named(link, name), Bridge(), most)
        try:
            yield host
        finally:
            host.stop()
