"""The arrays of llama.cpp's batch, made once and written for every pass."""

import ctypes

import numpy as np

from services.proxy_inference.batching import Plan, Share
from shared.engine.native import native, pointer
from shared.engine.soft_prompt import Inputs

_FEW = 8
"""So many tokens are sooner written one by one than by numpy."""


class LlamaBatch:
    """`sent` is what llama.cpp gets."""

    def __init__(
        self, most: int, spare: int, inputs: Inputs | None = None, *, drafted: bool
    ) -> None:
        """With `inputs` their embeddings are sent in place of the tokens.

        What fills a pass up goes to lane `spare`. Where passes are `drafted`, it is read as well if
        all others are: llama.cpp makes its graph anew whenever it has other sizes than the last.
        """
        self._most = most
        self._spare = spare
        self._drafted = drafted
        self._inputs = inputs
        self._embeddings = np.empty((0, 0), np.float32)
        tokens, positions, lanes = (np.zeros(most, np.int32) for _ in range(3))
        read = np.zeros(most, np.int8)
        ones = np.ones(most, np.int32)
        places = lanes.ctypes.data + 4 * np.arange(most, dtype=np.uint64)
        self._pointed_at = ones, places
        self._arrays = tokens, positions, lanes, read
        self._views = tuple(array.data for array in self._arrays)
        self.sent = native.llama_batch()
        if inputs is None:
            self.sent.token = pointer(tokens, ctypes.c_int32)
        self.sent.pos = pointer(positions, ctypes.c_int32)
        self.sent.n_seq_id = pointer(ones, ctypes.c_int32)
        self.sent.seq_id = pointer(places, ctypes.POINTER(ctypes.c_int32))
        self.sent.logits = pointer(read, ctypes.c_int8)

    def fill(self, plan: Plan, size: int, filled: int) -> int:
        """The batch holds the plan's `size` tokens and is filled up; how many of them are read."""
        assert filled <= self._most, f"a pass of {filled} tokens would abort the process"
        tokens, positions, lanes, read = self._views
        at = reads = 0
        for share in plan.shares:
            sequence = share.sequence
            assert sequence.lane is not None
            lane, first = sequence.lane.number, sequence.fed + share.skip
            unread = share.count - share.reads
            if share.count > _FEW:
                self._fill_many(share, at, lane)
            else:
                for place in range(share.count):
                    tokens[at + place] = sequence.tokens[first + place]
                    positions[at + place] = first + place
                    lanes[at + place] = lane
                    read[at + place] = place >= unread
            at += share.count
            reads += share.reads
        for place in range(filled - size):
            tokens[at] = 0
            positions[at] = place
            lanes[at] = self._spare
            read[at] = self._drafted and reads == size
            at += 1
        self.sent.n_tokens = filled
        if self._inputs is not None:
            self._embeddings = self._inputs.of(self._arrays[0][:filled])
            self.sent.embd = pointer(self._embeddings, ctypes.c_float)
        return reads

    def _fill_many(self, share: Share, at: int, lane: int) -> None:
        sequence, first = share.sequence, share.sequence.fed + share.skip
        tokens, positions, lanes, read = self._arrays
        end = at + share.count
        tokens[at:end] = sequence.tokens[first : first + share.count]
        positions[at:end] = range(first, first + share.count)
        lanes[at:end] = lane
        read[at:end] = 0
        read[end - share.reads : end] = 1
