"""Directions of a pool, dealt in order by a pointer that goes round it."""

from collections.abc import Sequence

from shared.messages import Range


def deal(position: int, count: int, pool: int, own: Sequence[Range]) -> list[Range]:
    """Up to `count` directions of range(pool), from `position` on and round, none of them in `own`.

    A device that measures a direction twice on the same rows learns nothing; fewer than `count`
    come back where it has few left.
    """
    dealt: list[Range] = []
    for start, end in ((position, pool), (0, position)):
        for first, last in _gaps(start, end, own):
            taken = min(count, last - first)
            if taken > 0:
                dealt.append((first, taken))
                count -= taken
    return dealt


def left_out(pool: int, survivors: Sequence[Range]) -> list[Range]:
    """What of range(pool) is not in `survivors`; nothing where there are none."""
    if not survivors:
        return []
    return [(start, end - start) for start, end in _gaps(0, pool, survivors) if end > start]


def _gaps(start: int, end: int, own: Sequence[Range]) -> list[tuple[int, int]]:
    """What of [start, end) is not in `own`, in order."""
    gaps: list[tuple[int, int]] = []
    for first, count in sorted(own):
        if first > start:
            gaps.append((start, min(first, end)))
        start = max(start, first + count)
        if start >= end:
            return gaps
    return [*gaps, (start, end)]
