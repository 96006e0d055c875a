"""From requests to generations: which one is meant, whether there is room, its pieces."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.proxy_inference.config import Settings
from services.proxy_inference.metrics import Metrics
from services.proxy_inference.pool import Held, Pool
from services.proxy_inference.requests import Mode, Refusal
from services.proxy_inference.routing import Routes
from services.proxy_inference.running import Piece, Run
from services.proxy_inference.shelf import Shelf
from services.proxy_inference.speaking import Speaker
from services.proxy_inference.swapping import Swapper
from services.proxy_inference.versions import BASE, Pin, UnknownVersion, Version, Versions
from services.proxy_inference.worker import Ticket, Worker
from shared import blobs
from shared.errors import EngineError, RejectError, TransientError
from shared.logs import get
from shared.messages import JobSpec

WEDGED_S = 60.0
"""A pass that takes longer has gone wrong: it has at most 512 tokens."""

RETRY_S = 1

log = get("proxy")


@dataclass(frozen=True, slots=True)
class Way:
    """How a request is answered: by whom, and with how long a prompt and answer at most."""

    mode: Mode
    alpha: float
    """0 where nothing is steered."""
    speaker: Speaker
    limit: int
    prompt: list[int]
    """What a prompt ends with: a soft prompt's rows."""
    fingerprint: str


class Proxy:
    """What the HTTP side asks."""

    def __init__(
        self,
        settings: Settings,
        worker: Worker,
        pool: Pool,
        versions: Versions,
        swapper: Swapper,
        shelf: Shelf,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.versions = versions
        self.swapper = swapper
        self.draining = False
        self.routes = Routes()
        self.metrics = Metrics(worker, pool, swapper, self.routes)
        self.metrics.waiting = lambda: max(self._tickets - pool.counts.running, 0)
        self._worker = worker
        self._shelf = shelf
        self._tickets = 0

    @property
    def unwell(self) -> str:
        """Why requests cannot be answered now; empty if they can."""
        if self.draining:
            return "the server is stopping"
        if self._worker.pass_s > WEDGED_S:
            return f"a pass through the model has taken {self._worker.pass_s:.0f} s so far"
        if self.pool.default is None:
            why = self.swapper.problem or self._nothing_yet()
            return f"no model is loaded yet: {why}"
        return ""

    async def drained(self, limit_s: float) -> None:
        """No new request is taken, and none is left, or `limit_s` has passed."""
        self.draining = True
        loop = asyncio.get_running_loop()
        until = loop.time() + limit_s
        while self.metrics.in_flight and loop.time() < until:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.02)
        log.info("drained", left=self.metrics.in_flight)

    async def held(self, model: str | None) -> Held:
        """The generation that `model` names; without a name, the one that serves.

        It is to be lent before anything is awaited.

        Raises:
            Refusal: 404 for what is not there, 503 for what cannot be had now.
        """
        default = self.pool.default
        if default is None:
            raise Refusal(503, self.unwell, code="not_ready", retry_s=5)
        if not model or (default.version and model in (default.version.job, default.name)):
            return default
        try:
            version = self._named(model)
            return self.pool.get(version) or await self.swapper.open(version)
        except UnknownVersion as error:
            raise Refusal(404, str(error), param="model", code="model_not_found") from error
        except (EngineError, RejectError) as error:
            raise Refusal(404, f"{model}: {error}", param="model", code="model_refused") from error
        except TransientError as error:
            if isinstance(error, blobs.NotStored) and "@" in model:
                why = f"{model} is not kept any more; /v1/models lists those that are"
                raise Refusal(404, why, param="model", code="model_not_found") from error
            raise Refusal(503, f"{model}: {error}", code="not_ready", retry_s=5) from error

    @asynccontextmanager
    async def lent(self, model: str | None) -> AsyncGenerator[Held]:
        """The generation that `model` names, alive while this is open. Raises as `held`."""
        held = await self.held(model)
        async with self.pool.lent(held):
            yield held

    def way(self, held: Held, mode: Mode | None, alpha: float | None) -> Way:
        """Who answers a request that asks for `mode` and `alpha`; None: it does not say.

        Raises:
            Refusal: the version cannot be asked so.
        """
        if mode is None and alpha is None:
            mode, alpha = self._usual(held)
        elif mode is None:
            mode = "ensemble"
        elif mode != "ensemble" and alpha is not None:
            raise Refusal(
                400, f"proxy_alpha is the ensemble's; mode {mode!r} has none", param="proxy_alpha"
            )
        small, ensemble, large = held.generation, held.ensemble, self.pool.large
        if mode == "small":
            return Way(mode, 0.0, small, small.limit, small.prompt, held.fingerprint)
        if ensemble is None or large is None or (mode == "ensemble" and not ensemble.steers):
            raise Refusal(
                400, f"{held.name}: {held.alone}", param="proxy_mode", code="mode_not_served"
            )
        fingerprint = f"{held.fingerprint}-large-{large.digest[:12]}"
        if mode == "large":
            return Way(mode, 0.0, ensemble, ensemble.limit, [], fingerprint)
        strength = self.settings.alpha if alpha is None else alpha
        return Way(
            mode, strength, ensemble, ensemble.limit, [], f"{fingerprint}-alpha-{strength:g}"
        )

    def _usual(self, held: Held) -> tuple[Mode, float | None]:
        """What answers, and how strongly, where nobody says what should."""
        wanted: Mode = self.settings.mode or "ensemble"
        alpha: float | None = None
        if not self.settings.mode and held.version is not None:
            best = self.routes.best(held.fingerprint, held.version.job)
            if best is not None:
                wanted, alpha = best.mode, best.alpha
        if held.ensemble is None or (wanted == "ensemble" and not held.ensemble.steers):
            return "small", None
        return wanted, alpha

    def spec_of(self, held: Held) -> JobSpec | None:
        """What a generation is asked by; the base model, to compare, by the job that serves."""
        if held.version is None and self.pool.default is not None:
            return self.pool.default.spec
        return held.spec

    def admit(self, count: int) -> None:
        """There is room for `count` more answers.

        Raises:
            Refusal: 429 if not now, 400 if never.
        """
        most = self.settings.sequences + self.settings.queue
        if count > most:
            raise Refusal(400, f"{count} answers in one request; at most {most} are served")
        if self._tickets + count > most:
            raise Refusal(
                429,
                f"{self._tickets} answers are being written or wait; ask again soon",
                code="queue_full",
                retry_s=RETRY_S,
            )

    @asynccontextmanager
    async def running(
        self, speaker: Speaker, runs: Sequence[Run]
    ) -> AsyncGenerator[AsyncGenerator[tuple[int, Piece], None], None]:
        """The runs' pieces, each with its run's index, until all have ended; the speaker is lent.

        What has not ended when this is left is cancelled.
        """
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        tickets = {index: Ticket(run, index, queue) for index, run in enumerate(runs)}
        self._tickets += len(runs)
        pieces = _pieces(queue, tickets)
        try:
            for ticket in tickets.values():
                self.pool.worker(speaker).submit(speaker, ticket)
            yield pieces
        finally:
            self._tickets -= len(runs)
            await pieces.aclose()
            for ticket in tickets.values():
                self.pool.worker(speaker).cancel(speaker, ticket)

    async def rollback(self, round: int | None) -> Pin:
        """The version to serve is pinned; it serves as soon as it is loaded.

        Raises:
            Refusal: it is not at hand.
        """
        default = self.pool.default
        try:
            pin = self.versions.rollback(default.version if default else None, round)
        except UnknownVersion as error:
            raise Refusal(404, str(error), param="round", code="version_not_found") from error
        await self._pinned(pin)
        return pin

    async def follow(self) -> None:
        """The preferred version serves again, as soon as it is loaded."""
        self.versions.follow()
        await self._pinned(None)

    async def settled(self, limit_s: float) -> bool:
        """Whether what is wanted serves, after waiting for it at most so long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limit_s
        while not self._settled():
            if loop.time() >= until:
                return False
            await asyncio.sleep(0.02)
        return True

    def _settled(self) -> bool:
        wanted, default = self.versions.wanted(), self.pool.default
        if wanted is None or default is None:
            return wanted is None
        return default.version is not None and default.version.digest == wanted.digest

    async def _pinned(self, pin: Pin | None) -> None:
        await asyncio.to_thread(self._shelf.set_pin, pin)
        log.info("pinned" if pin else "following", version=f"{pin.job}@{pin.round}" if pin else "")
        self.swapper.wake()

    def _named(self, model: str) -> Version | None:
        if model == BASE:
            return None
        job, at, text = model.partition("@")
        if at and not (text.isascii() and text.isdecimal() and len(text) <= 10):
            raise UnknownVersion(f"no model {model[:100]!r}: name JOB, JOB@ROUND or {BASE}")
        return self.versions.of(job, int(text) if at else None)

    def _nothing_yet(self) -> str:
        if self.versions.refused:
            return next(reversed(self.versions.refused.values()))
        return "no job has published a version, and no --model is given"


async def _pieces(
    queue: asyncio.Queue[tuple[int, Piece]], tickets: dict[int, Ticket]
) -> AsyncGenerator[tuple[int, Piece], None]:
    left = set(tickets)
    while left:
        index, piece = await queue.get()
        if piece.finish:
            left.discard(index)
        yield index, piece
