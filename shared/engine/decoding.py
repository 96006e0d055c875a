"""One decode in llama.cpp: a batch of tokens, or of embeddings in their place."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.engine.layout import Batch
from shared.engine.native import native, pointer, reason
from shared.errors import EngineError


def decode(context: Any, batch: Batch, embeddings: NDArray[np.float32] | None = None) -> None:
    """The batch is computed; `embeddings` (n, n_embd) stand for its tokens if there are any.

    Raises:
        EngineError: llama.cpp could not.
    """
    size = len(batch.tokens)
    one_each = np.ones(size, np.int32)
    pointers = batch.sequences.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
    sent = native.llama_batch()
    sent.n_tokens = size
    if embeddings is None:
        sent.token = pointer(batch.tokens, ctypes.c_int32)
    else:
        sent.embd = pointer(embeddings, ctypes.c_float)
    sent.pos = pointer(batch.positions, ctypes.c_int32)
    sent.n_seq_id = pointer(one_each, ctypes.c_int32)
    sent.seq_id = pointer(pointers, ctypes.POINTER(ctypes.c_int32))
    sent.logits = pointer(batch.read, ctypes.c_int8)
    code = native.llama_decode(context, sent)
    if code:
        raise EngineError(f"llama.cpp could not decode (code {code}); {reason()}")
