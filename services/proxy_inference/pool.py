"""The generations that are alive, who uses each, and which one new requests get.

At most MOST_ALIVE: a swap waits for room, and what is overtaken meanwhile is never opened.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from services.proxy_inference.ensemble.ensemble import Ensemble
from services.proxy_inference.ensemble.large import Large
from services.proxy_inference.generation import Generation, Weights
from services.proxy_inference.remote.ensemble import RemoteEnsemble
from services.proxy_inference.remote.host import RemoteHost
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import Room, Speaker
from services.proxy_inference.versions import BASE, Version
from services.proxy_inference.worker import Counts, Worker, total
from shared.adapter import Adapter
from shared.errors import EngineError, TransientError
from shared.logs import get
from shared.messages import JobSpec

MOST_ALIVE = 3
Result = TypeVar("Result")

log = get("pool")


@dataclass(eq=False)
class Held:
    """A generation that is alive."""

    generation: Generation
    version: Version | None
    spec: JobSpec | None
    ensemble: Ensemble | RemoteEnsemble | None = None
    """The large model, steered by this version."""
    alone: str = ""
    """Why there is no ensemble, or none that is steered."""
    users: int = 0
    asked_for: bool = False
    """Opened for a request that named it: it stays, idle, until its room is needed."""

    @property
    def name(self) -> str:
        return self.version.name if self.version else BASE

    @property
    def fingerprint(self) -> str:
        if self.version is not None:
            return self.version.fingerprint
        return f"{BASE}-{self.generation.weights.digest[:12]}"


class Pool:
    """Opens, lends and closes generations."""

    def __init__(
        self,
        worker: Worker,
        room: Room,
        large: Large | RemoteHost | None = None,
        waiter: Worker | None = None,
    ) -> None:
        """`waiter` steps what waits for a server, so that nothing else waits for it."""
        self.default: Held | None = None
        self.swaps = 0
        self.large = large
        self.changed = asyncio.Event()
        """Set whenever another generation gets the requests that name none."""
        self._worker = worker
        self._waiter = waiter or worker
        self._room = room
        self._held: list[Held] = []
        self._weights: dict[str, Weights] = {}
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Future[Any]] = set()
        """What is being opened or closed, whoever waits for it."""
        self._idle = asyncio.Event()
        self._freed = asyncio.Event()

    @property
    def alive(self) -> list[Held]:
        return list(self._held)

    @property
    def users(self) -> int:
        return sum(held.users for held in self._held)

    @property
    def counts(self) -> Counts:
        """What the workers have done together."""
        return total(one.counts for one in {self._worker, self._waiter})

    def worker(self, speaker: Speaker) -> Worker:
        """Who steps it."""
        return self._waiter if isinstance(speaker, RemoteEnsemble) else self._worker

    def get(self, version: Version | None) -> Held | None:
        """The generation of a version, or of the present base model, if it is alive."""
        for held in self._held:
            if version is not None:
                if held.version is not None and held.version.digest == version.digest:
                    return held
            elif held.version is None and self._is_present_base(held):
                return held
        return None

    async def open(
        self,
        version: Version | None,
        spec: JobSpec | None,
        adapter: Adapter | None,
        file: ModelFile,
        *,
        anchor: Adapter | None = None,
        asked_for: bool = False,
    ) -> Held:
        """A generation that may be lent, with its ensemble. Make room first: see `room`.

        Raises:
            TransientError: the room was taken meanwhile.
            EngineError: the model or its adapter cannot be served.
        """
        opening = self._open(version, spec, adapter, file, anchor, asked_for=asked_for)
        held = await self._to_its_end(opening)
        if held not in self._held:  # closed for somebody else's room before we came to use it
            raise TransientError("too many versions are asked for; ask again soon")
        return held

    async def _open(
        self,
        version: Version | None,
        spec: JobSpec | None,
        adapter: Adapter | None,
        file: ModelFile,
        anchor: Adapter | None,
        *,
        asked_for: bool,
    ) -> Held:
        async with self._changing:
            alive = self.get(version)
            if alive is not None:
                return alive
            if len(self._held) >= MOST_ALIVE:
                raise TransientError("too many versions are in use; ask again soon")
            weights = self._weights.get(file.digest)
            if weights is None:
                weights = await asyncio.to_thread(Weights, file)
                self._weights[file.digest] = weights
            weights.users += 1
            try:
                generation = await asyncio.to_thread(Generation, weights, adapter, self._room)
            except BaseException:
                await self._leave(weights)
                raise
            held = Held(generation, version, spec, asked_for=asked_for)
            try:
                await self._steer(held, weights, adapter, anchor)
            except BaseException:
                await asyncio.to_thread(generation.close)
                await self._leave(weights)
                raise
            self._worker.attach(generation)
            self._held.append(held)
            return held

    async def room(self) -> None:
        """Another generation may be opened; waits until a running one has ended if need be."""
        while len(self._held) >= MOST_ALIVE:
            self._freed.clear()
            if not await self._close_idle():
                await self._freed.wait()

    async def room_now(self) -> None:
        """As `room`, without waiting.

        Raises:
            TransientError: every generation is in use.
        """
        if len(self._held) >= MOST_ALIVE and not await self._close_idle():
            raise TransientError("too many versions are in use; ask again soon")

    def serve(self, held: Held) -> None:
        """New requests that name no version get this generation."""
        previous, self.default = self.default, held
        held.asked_for = False
        if previous is held:
            return
        self.swaps += 1
        log.info(
            "serving",
            version=held.name,
            fingerprint=held.fingerprint,
            before=previous.name if previous else "",
        )
        self.changed.set()
        self._tell_idle()

    @asynccontextmanager
    async def lent(self, held: Held) -> AsyncGenerator[Held]:
        """The generation stays alive while this is open."""
        held.users += 1
        try:
            yield held
        finally:
            held.users -= 1
            if not held.users:
                self._tell_idle()

    async def run(self) -> None:
        """Close what served before and is not used any more, until cancelled."""
        while True:
            await self._idle.wait()
            self._idle.clear()
            for held in self.alive:
                if held is not self.default and not held.users and not held.asked_for:
                    await self._close(held)

    async def close(self) -> None:
        """Everything is given back; the worker has ended."""
        while self._changes:
            await asyncio.wait(self._changes)
        for held in self.alive:
            self._held.remove(held)
            await self._give_back(held)
        if self.large is not None:
            await asyncio.to_thread(self.large.close)

    async def _close_idle(self) -> bool:
        """Whether a generation was idle and is closed now."""
        for held in self.alive:
            if held is not self.default and not held.users:
                await self._close(held)
                return True
        return False

    async def _close(self, held: Held) -> None:
        await self._to_its_end(self._closed(held))

    async def _closed(self, held: Held) -> None:
        async with self._changing:
            if held not in self._held or held.users or held is self.default:
                return
            self._held.remove(held)  # from here on it is not lent
            await self._worker.detach(held.generation)
            if held.ensemble is not None:
                await self.worker(held.ensemble).detach(held.ensemble)
            await self._give_back(held)
            log.info("version_closed", version=held.name)
        self._freed.set()

    async def _to_its_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` comes to. Who gives up waiting does not end it: a thread that opens a model
        cannot be ended, and what is half open or half closed belongs to nobody."""
        change = asyncio.ensure_future(work)
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        return await asyncio.shield(change)

    async def _steer(
        self, held: Held, weights: Weights, adapter: Adapter | None, anchor: Adapter | None
    ) -> None:
        """The version's ensemble, if there can be one; without it, the version serves alone."""
        if self.large is None:
            held.alone = "no large model is given: start the proxy with --large"
            return
        try:
            over = asyncio.to_thread(self.large.over, weights, adapter, anchor, self._room)
            held.ensemble = await over
        except EngineError as error:
            held.alone = str(error)
            log.error("version_alone", version=held.name, why=held.alone)
            return
        if not held.ensemble.steers:
            held.alone = f"{held.name} has nothing to steer with"
        self.worker(held.ensemble).attach(held.ensemble)

    async def _give_back(self, held: Held) -> None:
        await asyncio.to_thread(held.generation.close)
        if held.ensemble is not None:
            await asyncio.to_thread(held.ensemble.close)
        await self._leave(held.generation.weights)

    def _tell_idle(self) -> None:
        self._idle.set()
        self._freed.set()

    def _is_present_base(self, held: Held) -> bool:
        return self.default is None or held.generation.weights is self.default.generation.weights

    async def _leave(self, weights: Weights) -> None:
        weights.users -= 1
        if not weights.users:
            del self._weights[weights.digest]
            await asyncio.to_thread(weights.close)
