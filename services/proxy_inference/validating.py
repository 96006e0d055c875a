"""Measures every mode on validation rows whenever a version begins to serve.

Rows are scored where requests are answered: through the same desks, by the same passes, one row at
a time between the requests of users. Strengths of one row follow each other, so that what stands
before the answer is read once. A version that was overtaken meanwhile is measured to the end: where
versions come fast, some table is better than none.
"""

import asyncio
import os
from collections.abc import Sequence as Several
from dataclasses import dataclass
from errno import EACCES

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Sequence
from services.proxy_inference.pool import Held
from services.proxy_inference.requests import Mode, Refusal
from services.proxy_inference.routing import Judge, Route, Table, table
from services.proxy_inference.running import Piece
from services.proxy_inference.sampling import Draft
from services.proxy_inference.service import Proxy, Way
from services.proxy_inference.vocabulary import Detokenizer
from shared.dataset import Dataset
from shared.engine import scoring
from shared.engine.examples import choice_tokens, example, messages
from shared.engine.model import Example, Losses
from shared.errors import ConfigError, EngineError
from shared.logs import get
from shared.messages import Task

MOST_ROWS = 200
ALPHAS = (0.5, 1.0, 1.5)
"""Beside the one that is set."""

log = get("validating")


@dataclass(frozen=True, slots=True)
class Slice:
    """Validation rows as one job understands them; `choices` are its labels' tokens."""

    examples: list[Example]
    choices: NDArray[np.int64] | None

    @property
    def judge(self) -> Judge:
        return "loss" if self.choices is None else "accuracy"


class Scored:
    """One row that is read through, and what the model thinks of its answer. A Run."""

    def __init__(
        self, row: Example, choices: NDArray[np.int64] | None, prompt: list[int], alpha: float
    ) -> None:
        """`prompt`: what stands right before the answer, a soft prompt's rows."""
        tokens: list[int] = row.tokens.tolist()
        tokens[row.asked : row.asked] = prompt
        self.sequence = Sequence(tokens, read_from=len(tokens) - len(row.targets), alpha=alpha)
        self.loss = 0.0
        """In nats, of all that was read."""
        self.right = True
        self._targets = row.targets.astype(np.int64)
        self._choices = choices
        self._read = 0

    @property
    def left(self) -> int:
        return 0

    def drafter(self) -> None:
        return None

    def take(self, logits: NDArray[np.float32], drafts: Several[Draft] = ()) -> Piece | None:
        targets = self._targets[self._read : self._read + len(logits)]
        losses, right = scoring.losses(logits, targets, self._choices)
        self.loss += float(losses.sum())
        self.right = self.right and bool(right.all())
        self._read += len(logits)
        return Piece(finish="stop") if self._read == len(self._targets) else None


class Validator:
    """Keeps the proxy's `routes` up to date with what serves."""

    def __init__(self, proxy: Proxy, path: str) -> None:
        """`path`: rows in any of the formats that devices may hold."""
        self._proxy = proxy
        self._path = path
        self._routes = proxy.routes

    async def run(self) -> None:
        """Each version that begins to serve is measured, until cancelled."""
        pool = self._proxy.pool
        while True:
            await pool.changed.wait()
            pool.changed.clear()
            held = pool.default
            if held is None or held.version is None or self._routes.of(held.fingerprint):
                continue
            try:
                async with pool.lent(held):
                    await self._validate(held)
            except EngineError as error:
                self._routes.problem = str(error)
                log.error("not_validated", version=held.name, why=str(error))
            finally:
                self._routes.measuring = ""

    async def _validate(self, held: Held) -> None:
        assert held.version is not None
        self._routes.problem, self._routes.measuring = "", held.name
        began = asyncio.get_running_loop().time()
        found = await self.measured(held)
        self._routes.put(held.fingerprint, held.version.job, found)
        log.info(
            "validated",
            version=held.name,
            rows=found.rows,
            best=str(found.best),
            seconds=round(asyncio.get_running_loop().time() - began, 1),
        )

    async def measured(self, held: Held) -> Table:
        """What every mode that `held` serves comes to; it is lent.

        Raises:
            EngineError: there are no rows for its job; names the mend.
        """
        ways = {route: self._way(held, route) for route in self._wanted()}
        found = {route: way for route, way in ways.items() if way is not None}
        room = min(way.limit - len(way.prompt) for way in found.values())
        spec = self._proxy.spec_of(held)
        if spec is None:
            raise EngineError(f"{held.name}: its job is not known, so no row can be understood")
        vocabulary = held.generation.weights.vocabulary
        rows = await asyncio.to_thread(read, self._path, spec.task, vocabulary, room)
        loss = {route: np.zeros(len(rows.examples)) for route in found}
        right = {route: np.zeros(len(rows.examples), np.bool_) for route in found}
        for number, row in enumerate(rows.examples):
            for route, way in found.items():
                run = Scored(row, rows.choices, way.prompt, way.alpha)
                async with self._proxy.running(way.speaker, [run]) as pieces:
                    async for _, piece in pieces:
                        if piece.finish == "error":
                            run.loss = float("nan")
                loss[route][number], right[route][number] = run.loss, run.right
        weight = np.array([len(row.targets) for row in rows.examples], np.int64)
        measured = {route: Losses(loss[route], weight, right[route]) for route in found}
        return table(measured, rows.judge)

    def _wanted(self) -> list[Route]:
        strengths = sorted({*ALPHAS, self._proxy.settings.alpha} - {0.0})
        return [Route("small"), Route("large"), *(Route("ensemble", one) for one in strengths)]

    def _way(self, held: Held, route: Route) -> Way | None:
        """Who answers so; None where this version cannot be asked so."""
        mode: Mode = route.mode
        try:
            return self._proxy.way(held, mode, route.alpha)
        except Refusal:
            return None


def check_readable(path: str) -> None:
    """Raises ConfigError where `path` is named and cannot be read."""
    if not path:
        return
    try:
        os.stat(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(EACCES, os.strerror(EACCES))
    except OSError as error:
        raise ConfigError(
            f"--validation {path}: cannot be read: {error.strerror}; name a file of rows"
        ) from error


def read(path: str, task: Task, vocabulary: Detokenizer, room: int) -> Slice:
    """The first MOST_ROWS rows of `path`, at most `room` tokens each.

    Raises:
        EngineError: it cannot be read, or has no row for `task`; names the file and the mend.
    """
    task = msgspec.structs.replace(task, max_tokens=min(task.max_tokens, room))
    data = Dataset(path, task, lambda turn: vocabulary.chat.pieces(messages(turn)))
    data.require()
    examples = [example(row, task, vocabulary) for row in data.rows[:MOST_ROWS]]
    if task.loss != "choices":
        return Slice(examples, None)
    return Slice(examples, np.array(choice_tokens(task, vocabulary), np.int64))
