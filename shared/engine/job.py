"""One job as the child holds it: adapter, model and data, and what they say together."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared import dataset
from shared.adapter import Adapter
from shared.dataset import Dataset
from shared.engine import last_layer
from shared.engine.examples import choice_tokens, example
from shared.engine.model import Adaptation, Engine, Example, Losses, Sites
from shared.engine.protocol import Opened, OpenJob, Standing
from shared.errors import EngineError

Part = Literal["data", "heldout"]

_CHUNK_ROWS = 256
"""Rows that are tokens at the same time; a multiple of what one decode holds."""


class Job:
    """Stands at the base model until commits or a snapshot move it."""

    def __init__(self, request: OpenJob, engine: Engine) -> None:
        """Load the data, then the model.

        Raises:
            EngineError: the data, the model or the manifest cannot be used; names the mend.
        """
        self.request = request
        self.adapter = Adapter.fresh(request.manifest)
        self.layout = self.adapter.layout
        self.data = {
            "data": _read(request.data, request),
            "heldout": _read(request.heldout, request),
        }
        manifest = self.adapter.manifest
        adaptation = Adaptation(
            manifest.architecture,
            manifest.seed,
            manifest.epoch,
            manifest.blocks,
            self.layout.offsets,
        )
        rows = adaptation.output_rows
        if len(np.unique(rows)) != len(rows):
            raise EngineError("manifest: an output row stands in two blocks; name each row once")
        self.has_output_rows = bool(len(rows))
        task = request.task
        self.model = engine.open(request.model, adaptation, request.threads, task.max_tokens)
        try:
            choices = choice_tokens(task, self.model) if task.loss == "choices" else []
        except EngineError:
            self.model.close()
            raise
        self.model.choose_among(choices)
        self._cache = last_layer.SiteCache()
        self._base: tuple[object, Losses] | None = None

    def opened(self) -> Opened:
        """What the daemon is told of a job just opened."""
        data, heldout = self.data["data"], self.data["heldout"]
        return Opened(
            digest=self.adapter.digest(),
            rows=len(data.rows),
            heldout_rows=len(heldout.rows),
            refused_rows=data.refused_rows + heldout.refused_rows,
            refused=[*data.refused, *heldout.refused][: dataset.REFUSED_SHOWN],
        )

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

    def examples(self, part: Part, rows: Sequence[int]) -> list[Example]:
        """Rows of the data as tokens."""
        task, held = self.request.task, self.data[part].rows
        return [example(held[row], task, self.model) for row in rows]

    def base_losses(self, rows: Sequence[int], examples: Sequence[Example]) -> Losses:
        """Losses of `examples`, the data's `rows`, at theta; measured once per theta and batch."""
        key = (self.adapter.digest(), tuple(rows))
        if self._base is None or self._base[0] != key:
            self.model.stand(self.adapter.values())
            self._base = (key, self.model.measure(examples))
        return self._base[1]

    def sites(self, part: Part, rows: Sequence[int]) -> list[Sites]:
        """The last layer's sites of rows of the data; only what is not kept is sent forward."""
        deep, stamp = self._deeper()
        self._cache.stand(stamp)
        found = {row: self._cache.get((part, row)) for row in rows}
        missing = [row for row, sites in found.items() if sites is None]
        for low in range(0, len(missing), _CHUNK_ROWS):
            chunk = missing[low : low + _CHUNK_ROWS]
            self.model.stand(deep)
            measured = self.model.sites(self.examples(part, chunk))
            for row, sites in zip(chunk, measured, strict=True):
                found[row] = sites
                self._cache.put((part, row), sites)
        return [sites for sites in found.values() if sites is not None]

    def losses(self, part: Part, rows: Sequence[int]) -> Losses:
        """Losses of rows of the data at theta."""
        chunks: list[Losses] = []
        for low in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[low : low + _CHUNK_ROWS]
            if self.has_output_rows:
                chunks.append(last_layer.losses(self.sites(part, chunk), self.deltas()))
            else:
                self.model.stand(self.adapter.values())
                chunks.append(self.model.measure(self.examples(part, chunk)))
        return Losses(
            np.concatenate([chunk.loss for chunk in chunks]),
            np.concatenate([chunk.weight for chunk in chunks]),
            np.concatenate([chunk.right for chunk in chunks]),
        )

    def deltas(self) -> NDArray[np.float64]:
        """The output rows' part of theta, in the order of their blocks: (r, n_embd) float64."""
        values = self.adapter.values()
        offsets = self.layout.offsets
        return np.concatenate(
            [
                values[offsets[number] : offsets[number + 1]].reshape(block.shape)
                for number, block in enumerate(self.adapter.manifest.blocks)
                if block.kind == "output_rows"
            ]
        ).astype(np.float64)

    def _deeper(self) -> tuple[NDArray[np.float32], bytes]:
        """Theta with its output rows at zero, and a stamp of it."""
        values = self.adapter.values()
        offsets = self.layout.offsets
        for number, block in enumerate(self.adapter.manifest.blocks):
            if block.kind == "output_rows":
                values[offsets[number] : offsets[number + 1]] = 0.0
        return values, hashlib.sha256(values.data).digest()


def _read(path: str, request: OpenJob) -> Dataset:
    if not path:
        dataset.check_task(request.task)
        return Dataset([], [], 0)
    return dataset.read(path, request.task)
