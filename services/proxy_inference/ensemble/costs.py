"""What a pass of so many tokens costs, as measured: the verification curve v(g). Pure."""

from bisect import bisect_left

_WEIGHT = 0.1
"""Of a new measurement, once there are some."""
_SETTLED = 3
_OUTLIER = 4.0
"""A pass that took so many times what is expected was held up by something else."""


class Curve:
    """Seconds of a pass by its tokens: measured, between measurements a line, beyond in proportion.

    It never falls: a pass of more tokens is taken to cost as much at least.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._sizes: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def measured(self, size: int, seconds: float) -> None:
        seen = self._seen.get(size, 0)
        if not seen:
            self._sizes.insert(bisect_left(self._sizes, size), size)
            self._seconds[size] = seconds
        elif seen < _SETTLED:
            self._seconds[size] = min(self._seconds[size], seconds)
        elif seconds < _OUTLIER * self._seconds[size]:
            self._seconds[size] += _WEIGHT * (seconds - self._seconds[size])
        self._seen[size] = seen + 1

    def seconds(self, size: int) -> float:
        """Raises ValueError where nothing was measured."""
        if not self._sizes:
            raise ValueError("nothing was measured")
        if size <= 0:
            return 0.0
        place = bisect_left(self._sizes, size)
        low = max((self._seconds[one] for one in self._sizes[:place]), default=0.0)
        if place == len(self._sizes):
            return low * size / self._sizes[-1]
        above = self._sizes[place]
        high = max(self._seconds[above], low)
        if above == size or not place:
            return high
        below = self._sizes[place - 1]
        return low + (high - low) * (size - below) / (above - below)
