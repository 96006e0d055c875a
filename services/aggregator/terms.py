"""Terms of a commit: coefficients by direction, as runs, and their sum."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.adapter import coefficients, term
from shared.messages import Term
from shared.ranges import indices, runs

_MOST_RUNS = 1024


def merged(terms: Sequence[Term]) -> list[Term]:
    """Terms of the same stream round and scope as one, their coefficients added."""
    sums: dict[tuple[int, tuple[int, int]], dict[int, int]] = {}
    for one in terms:
        found = sums.setdefault((one.stream_round, one.scope), {})
        values = coefficients(one).tolist()
        for index, value in zip(indices(one.ranges), values, strict=True):
            found[index] = found.get(index, 0) + value
    added: list[Term] = []
    for (stream_round, scope), found in sorted(sums.items()):
        moved = sorted(found)
        values = np.array([found[index] for index in moved], np.int64)
        added.append(term(stream_round, scope, runs(moved), values))
    return added


def of_pool(
    stream_round: int, scope: tuple[int, int], values: NDArray[np.int64], measured: NDArray[np.bool]
) -> Term:
    """The term of a whole pool: (P,) coefficients where `measured` (P,) says there is one."""
    moved = np.flatnonzero(measured)
    found = runs(moved.tolist())
    if len(found) > _MOST_RUNS:  # zeros cost less than runs
        found = [(int(moved[0]), int(moved[-1] - moved[0] + 1))]
        moved = np.arange(moved[0], moved[-1] + 1)
    return term(stream_round, scope, found, values[moved])
