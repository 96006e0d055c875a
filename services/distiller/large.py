"""What the large model says of public rows: its GGUF file in-process, by llama.cpp."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from services.distiller.buckets import Buckets, cut, joined, likeliest
from services.distiller.public import Public
from shared.engine.fitting import supported_header
from shared.engine.llama import LlamaEngine, LlamaModel
from shared.engine.model import Adaptation

_CHUNK_ROWS = 64


class Large:
    """A model without an adapter, and its tokenizer."""

    def __init__(self, path: Path, *, threads: int, max_tokens: int) -> None:
        """Load it.

        Raises:
            EngineError: it is missing, damaged, not supported, or too short for `max_tokens`.
        """
        architecture = supported_header(str(path)).architecture
        nothing = Adaptation(architecture, 0, 0, [], [0])
        self.model: LlamaModel = LlamaEngine().open(str(path), nothing, threads, max_tokens)

    def heard(
        self,
        public: Public,
        *,
        k: int,
        width: int,
        temperature: float,
        told: Callable[[int], None] = lambda rows: None,
    ) -> Buckets:
        """Its buckets of the `k` likeliest tokens among the first `width`, or of the choices.

        `told` is told how many rows are done.

        Raises:
            EngineError: llama.cpp failed.
        """
        parts: list[Buckets] = []
        choices = np.array(public.choices, np.int32)
        for low in range(0, len(public.examples), _CHUNK_ROWS):
            chunk = public.examples[low : low + _CHUNK_ROWS]
            done = int(public.starts[low])
            for found in self.model.logits(chunk):
                logits = found[:, :width].copy()
                ids = likeliest(logits, k)
                if public.choices:
                    ids = np.tile(choices, (len(logits), 1))
                parts.append(
                    cut(
                        logits,
                        public.targets[done : done + len(logits)],
                        ids=ids,
                        choices=bool(public.choices),
                        temperature=temperature,
                    )
                )
                done += len(logits)
            told(low + len(chunk))
        return joined(parts)

    def close(self) -> None:
        """Give back what the model holds."""
        self.model.close()
