"""Runs of directions, (first, count) each: how messages say which of a pool are meant.

Without numpy, which daemon and scheduler do not load.
"""

from collections.abc import Iterable, Iterator

from shared.messages import Range


def width(ranges: Iterable[Range]) -> int:
    """How many directions `ranges` holds."""
    return sum(count for _, count in ranges)


def indices(ranges: Iterable[Range]) -> Iterator[int]:
    """The directions of `ranges`, in its order."""
    for first, count in ranges:
        yield from range(first, first + count)


def runs(ascending: Iterable[int]) -> list[Range]:
    """Ascending directions as ranges."""
    found: list[Range] = []
    first = end = -1
    for index in ascending:
        if index != end:
            if end > first:
                found.append((first, end - first))
            first = index
        end = index + 1
    return [*found, (first, end - first)] if end > first else found
