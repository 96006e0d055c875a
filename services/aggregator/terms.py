"""Terms of a commit: coefficients by direction, as runs, and their sum."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.adapter import coefficients, term
from shared.messages import Term

_MOST_RUNS = 1024


def runs(indices: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Ascending indices as runs (first, count)."""
    if not len(indices):
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return [(int(run[0]), len(run)) for run in np.split(indices, breaks)]


def merged(terms: Sequence[Term]) -> list[Term]:
    """Terms of the same stream round and scope as one, their coefficients added."""
    sums: dict[tuple[int, tuple[int, int]], dict[int, int]] = {}
    for one in terms:
        found = sums.setdefault((one.stream_round, one.scope), {})
        values = coefficients(one).tolist()
        indices = (i for first, count in one.ranges for i in range(first, first + count))
        for index, value in zip(indices, values, strict=True):
            found[index] = found.get(index, 0) + value
    added: list[Term] = []
    for (stream_round, scope), found in sorted(sums.items()):
        indices = np.array(sorted(found), np.intp)
        values = np.array([found[int(index)] for index in indices], np.int64)
        added.append(term(stream_round, scope, runs(indices), values))
    return added


def of_pool(
    stream_round: int, scope: tuple[int, int], values: NDArray[np.int64], measured: NDArray[np.bool]
) -> Term:
    """The term of a whole pool: (P,) coefficients where `measured` (P,) says there is one."""
    indices = np.flatnonzero(measured)
    found = runs(indices)
    if len(found) > _MOST_RUNS:  # zeros cost less than runs
        found = [(int(indices[0]), int(indices[-1] - indices[0] + 1))]
        indices = np.arange(indices[0], indices[-1] + 1)
    return term(stream_round, scope, found, values[indices])
