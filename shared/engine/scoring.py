"""From logits to losses and to the last layer's sites.

Logits are (m, n_vocab) float32, of m positions. Exponentials are taken in float32, of differences
to the largest, and summed in float64; over choices all is float64. Chunks bound the memory beside
the logits themselves.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shared.engine.model import Sites

_CHUNK_ENTRIES = 1 << 17
"""Below the size from which the heap gives a block back, to be faulted in again page by page."""

Logits = NDArray[np.float32]


def losses(
    logits: Logits, targets: NDArray[np.int64], choices: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Loss of each position in nats, (m,) float64, and whether its target is the likeliest.

    `targets` (m,) index `choices`, or the vocabulary where there are none.
    """
    if choices is not None:
        among = logits[:, choices].astype(np.float64)
        normaliser, largest = _log_sum_exp(among)
        at_target = among[np.arange(len(among)), targets]
    else:
        normaliser, largest = _over_vocabulary(logits, np.empty(0, np.int64))
        at_target = logits[np.arange(len(logits)), targets].astype(np.float64)
    return normaliser - at_target, at_target >= largest


def sites(
    logits: Logits,
    hidden: NDArray[np.float32],
    targets: NDArray[np.int64],
    rows: NDArray[np.int64],
    choices: NDArray[np.int64] | None,
) -> Sites:
    """The sites of m positions with states `hidden` (m, n_embd); `rows` (r,) are adapted.

    `targets` (m,) as in `losses`.
    """
    adapted = logits[:, rows].astype(np.float64)
    if choices is None:
        rest, rest_max = _over_vocabulary(logits, rows)
    else:
        adapted[:, ~np.isin(rows, choices)] = -np.inf
        others = logits[:, choices[~np.isin(choices, rows)]].astype(np.float64)
        rest, rest_max = _log_sum_exp(others)
        targets = choices[targets]
    places = {row: place for place, row in enumerate(rows.tolist())}
    return Sites(
        hidden=hidden.copy(),
        rows=adapted,
        rest=rest,
        rest_max=rest_max,
        target=np.array([places.get(target, -1) for target in targets.tolist()], np.int32),
        target_logit=logits[np.arange(len(logits)), targets].astype(np.float64),
    )


def split(whole: Sites, counts: list[int]) -> Iterator[Sites]:
    """The sites of consecutive examples with `counts` positions each."""
    start = 0
    for count in counts:
        part = slice(start, start + count)
        yield Sites(
            hidden=whole.hidden[part].copy(),
            rows=whole.rows[part].copy(),
            rest=whole.rest[part].copy(),
            rest_max=whole.rest_max[part].copy(),
            target=whole.target[part].copy(),
            target_logit=whole.target_logit[part].copy(),
        )
        start += count


def _over_vocabulary(
    logits: Logits, without: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-sum-exp and largest of each position's logits but those of rows `without`: (m,) each."""
    sums = np.empty(len(logits), np.float64)
    largest = np.empty(len(logits), np.float64)
    step = max(1, _CHUNK_ENTRIES // logits.shape[1])
    for low in range(0, len(logits), step):
        part = slice(low, low + step)
        chunk = logits[part].copy()
        chunk[:, without] = -np.inf
        top = chunk.max(axis=1)
        with np.errstate(invalid="ignore"):  # diverged, or no other logits: the sum tells
            chunk -= np.where(top > -np.inf, top, 0.0)[:, None]
        np.exp(chunk, out=chunk)
        sums[part] = chunk.sum(axis=1, dtype=np.float64)
        largest[part] = top
    return _finished(sums, largest), largest


def _log_sum_exp(logits: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-sum-exp and largest over the last axis of (m, k): (m,) each, -inf where k = 0."""
    largest = logits.max(axis=1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        sums = np.exp(logits - largest[:, None]).sum(axis=1)
    return _finished(sums, largest), largest


def _finished(sums: NDArray[np.float64], largest: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(largest > -np.inf, largest, 0.0) + np.log(sums)
