"""What a pass of so many tokens costs, as measured: the verification curve v(g). Pure."""

from bisect import bisect_left

_WEIGHT = 0.1
_OUTLIER = 4.0
"""A pass that took so many times what is expected was held up by something else."""


class Curve:
    """Seconds of a pass by its tokens.

    Its shape is that of trials, between them a line, beyond them in proportion; it is scaled by
    what passes in service took in comparison, of the same size where there were any.
    """

    def __init__(self) -> None:
        self._trials: dict[int, float] = {}
        self._sizes: list[int] = []
        self._factors: dict[int, float] = {}
        self._factor = 1.0

    def tried(self, size: int, seconds: float) -> None:
        """A trial; of several the shortest counts."""
        if size not in self._trials:
            self._sizes.insert(bisect_left(self._sizes, size), size)
        self._trials[size] = min(seconds, self._trials.get(size, seconds))

    def measured(self, size: int, seconds: float) -> None:
        """A pass in service; there have been trials."""
        factor = seconds / self._shape(size)
        known = self._factors.get(size, self._factor)
        if factor > _OUTLIER * known:
            factor = _OUTLIER * known  # so that a lasting change is followed
        self._factors[size] = known + _WEIGHT * (factor - known)
        self._factor += _WEIGHT * (factor - self._factor)

    def seconds(self, size: int) -> float:
        """Of a pass of `size` tokens, at least one."""
        return self._shape(size) * self._factors.get(size, self._factor)

    def _shape(self, size: int) -> float:
        place = bisect_left(self._sizes, size)
        if place == len(self._sizes):
            return self._trials[self._sizes[-1]] * size / self._sizes[-1]
        above = self._sizes[place]
        if above == size or not place:
            return self._trials[above]
        below = self._sizes[place - 1]
        low, high = self._trials[below], self._trials[above]
        return low + (high - low) * (size - below) / (above - below)
