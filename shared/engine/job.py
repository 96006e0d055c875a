"""One job as the child holds it: adapter, model and data, and what they say together."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.adapter import Adapter
from shared.dataset import REFUSED_SHOWN, Dataset, Row, Turn, check_task
from shared.engine.closed_form import ClosedForm, Kept, closed_form
from shared.engine.examples import choice_tokens, example, messages, with_prompt
from shared.engine.model import Adaptation, Engine, Example, Losses
from shared.engine.protocol import Held, Opened, OpenJob, Standing
from shared.engine.site_cache import SiteCache
from shared.errors import EngineError

Rows = Sequence[Row | Turn]

_CHUNK_ROWS = 256
"""Rows that are tokens at the same time; a multiple of what one decode holds."""


class Job:
    """Stands at the base model until commits or a snapshot move it."""

    def __init__(self, request: OpenJob, engine: Engine) -> None:
        """Load the model, then the data.

        Raises:
            EngineError: the data, the model or the manifest cannot be used; names the mend.
        """
        self.request = request
        self.adapter = Adapter.fresh(request.manifest)
        self.layout = self.adapter.layout
        manifest = self.adapter.manifest
        adaptation = Adaptation(
            manifest.architecture,
            manifest.seed,
            manifest.epoch_of_a,
            manifest.blocks,
            self.layout.offsets,
        )
        rows = adaptation.output_rows
        if len(np.unique(rows)) != len(rows):
            raise EngineError("manifest: an output row stands in two blocks; name each row once")
        task = request.task
        self._task = with_prompt(task, adaptation)
        self.model = engine.open(request.model, adaptation, request.threads, task.max_tokens)
        try:
            choices = choice_tokens(task, self.model) if task.loss == "choices" else []
            self._data = self._read(request.data)
            self._heldout = self._read(request.heldout)
        except EngineError:
            self.model.close()
            raise
        self.model.choose_among(choices)
        self.closed, self.no_closed_form = closed_form(self.model, adaptation)
        self._cache = SiteCache()
        self._base: tuple[object, Losses] | None = None
        self._round: tuple[int, Rows] | None = None

    def opened(self) -> Opened:
        """What the daemon is told of a job just opened."""
        held = self._held()
        return Opened(
            digest=self.adapter.digest(),
            rows=held.rows,
            heldout_rows=held.heldout_rows,
            refused_rows=held.refused_rows,
            refused=held.refused,
        )

    def look(self) -> Held:
        """See what data has come, gone or changed; a round that has begun keeps its rows."""
        for data in (self._data, self._heldout):
            if data is not None:
                data.refresh()
        return self._held()

    def rows_of(self, round: int) -> Rows:
        """The rows of the data as they were when work for `round` first asked for them.

        Raises:
            EngineError: there are none.
        """
        if self._round is None or self._round[0] != round:
            self._round = (round, _now(self._data, "data"))
        return self._round[1]

    def heldout(self) -> Rows:
        """The held-out rows as they are now.

        Raises:
            EngineError: there are none.
        """
        return _now(self._heldout, "heldout")

    def standing(self) -> Standing:
        return Standing(round=self.adapter.round, digest=self.adapter.digest())

    def restore(self, snapshot: bytes) -> None:
        """Stand where `snapshot` says.

        Raises:
            MalformedMessage: it is no snapshot of this manifest.
        """
        self.adapter = Adapter.from_bytes(self.request.manifest, snapshot)

    def require(self, digest: str) -> None:
        """Refuse work that is not for the adapter as it stands.

        Raises:
            EngineError: says where the adapter stands.
        """
        if digest != self.adapter.digest():
            raise EngineError(
                f"the work is for adapter {digest[:12]}, the engine stands at "
                f"{self.adapter.digest()[:12]} after round {self.adapter.round}; catch up first"
            )

    def examples(self, rows: Rows) -> list[Example]:
        """Rows as tokens."""
        return [example(row, self._task, self.model) for row in rows]

    def base_losses(self, rows: Rows, examples: Sequence[Example]) -> Losses:
        """Losses of `examples`, which are `rows`, at theta; measured once per theta and batch."""
        key = (self.adapter.digest(), tuple(rows))
        if self._base is None or self._base[0] != key:
            self.model.stand(self.adapter.values())
            self._base = (key, self.model.measure(examples))
        return self._base[1]

    def sites(self, closed: ClosedForm, rows: Rows) -> list[Kept]:
        """The sites of rows; only what is not kept is sent forward.

        Kept by what a row says, so that data which grows or is read anew costs only what is new.
        """
        deep, stamp = self._deeper(closed)
        self._cache.stand(stamp)
        found = {row: self._cache.get(row) for row in rows}
        missing = [row for row, sites in found.items() if sites is None]
        for low in range(0, len(missing), _CHUNK_ROWS):
            chunk = missing[low : low + _CHUNK_ROWS]
            self.model.stand(deep)
            measured = closed.sites(self.examples(chunk))
            for row, sites in zip(chunk, measured, strict=True):
                found[row] = sites
                self._cache.put(row, sites)
        return [sites for row in rows if (sites := found[row]) is not None]

    def gradient(self, closed: ClosedForm, rows: Rows) -> tuple[Losses, NDArray[np.float64]]:
        """Losses of rows at theta, and the gradient of their sum, (d,) float64."""
        whole = np.zeros(self.layout.d)
        chunks: list[Losses] = []
        for low in range(0, len(rows), _CHUNK_ROWS):
            sites = self.sites(closed, rows[low : low + _CHUNK_ROWS])
            losses, gradient = closed.gradient(sites, self.adapter.values())
            whole += gradient
            chunks.append(losses)
        return _together(chunks), whole

    def losses(self, rows: Rows) -> Losses:
        """Losses of rows at theta."""
        chunks: list[Losses] = []
        for low in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[low : low + _CHUNK_ROWS]
            if self.closed is not None:
                sites = self.sites(self.closed, chunk)
                chunks.append(self.closed.losses(sites, self.adapter.values()))
            else:
                self.model.stand(self.adapter.values())
                chunks.append(self.model.measure(self.examples(chunk)))
        return _together(chunks)

    def _deeper(self, closed: ClosedForm) -> tuple[NDArray[np.float32], bytes]:
        """Theta with the blocks of the closed form at zero, and a stamp of it."""
        values = self.adapter.values()
        offsets = self.layout.offsets
        for number in closed.numbers:
            values[offsets[number] : offsets[number + 1]] = 0.0
        return values, hashlib.sha256(values.data).digest()

    def _read(self, path: str) -> Dataset | None:
        task = self.request.task
        if not path:
            check_task(task)
            return None
        return Dataset(path, task, lambda turn: self.model.chat.pieces(messages(turn)))

    def _held(self) -> Held:
        both = [data for data in (self._data, self._heldout) if data is not None]
        return Held(
            rows=len(self._data.rows) if self._data else 0,
            heldout_rows=len(self._heldout.rows) if self._heldout else 0,
            refused_rows=sum(data.refused_rows for data in both),
            refused=[why for data in both for why in data.refused][:REFUSED_SHOWN],
        )


def _together(chunks: Sequence[Losses]) -> Losses:
    return Losses(
        np.concatenate([chunk.loss for chunk in chunks]),
        np.concatenate([chunk.weight for chunk in chunks]),
        np.concatenate([chunk.right for chunk in chunks]),
    )


def _now(data: Dataset | None, setting: str) -> Rows:
    if data is None:
        raise EngineError(f"the job was opened without rows; set the device's {setting}")
    data.refresh()
    data.require()
    return data.rows
