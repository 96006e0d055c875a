"""What a pass of so many tokens costs, as measured: the verification curve v(g). Pure."""

from bisect import bisect_left
from dataclasses import dataclass, field

_WEIGHT = 0.1
_OUTLIER = 4.0
"""A pass that took so many times what is expected was held up by something else."""
_PRIOR = 10.0
_MEMORY = 50.0
"""About so many passes of one size count, against so many of all sizes together."""
_NONE = (0.0, 0.0)


class Curve:
    """Seconds of a pass by its tokens.

    Its shape is that of trials, between them a line, beyond them in proportion; it is scaled by
    what passes in service took in comparison, those of the same size first.
    """

    def __init__(self) -> None:
        self._trials: dict[int, float] = {}
        self._sizes: list[int] = []
        self._shapes: dict[int, float] = {}
        """By size, as the trials have it."""
        self._scale = 1.0
        self._own: dict[int, tuple[float, float]] = {}
        """By size: how many passes count, and their mean scale."""

    @property
    def known(self) -> bool:
        """Whether there have been trials."""
        return bool(self._sizes)

    def tried(self, size: int, seconds: float) -> None:
        """A trial; of several the shortest counts."""
        if size not in self._trials:
            self._trials[size] = seconds  # first: another version's passes may ask meanwhile
            self._sizes.insert(bisect_left(self._sizes, size), size)
        self._trials[size] = min(seconds, self._trials[size])
        self._shapes = {}

    def measured(self, size: int, seconds: float) -> None:
        """A pass in service; there have been trials."""
        scale = min(seconds / self._shape(size), _OUTLIER * self._scale_of(size))
        self._scale += _WEIGHT * (scale - self._scale)
        count, mean = self._own.get(size, _NONE)
        count = min(count + 1.0, _MEMORY)
        self._own[size] = count, mean + (scale - mean) / count

    def seconds(self, size: int) -> float:
        """Of a pass of `size` tokens, at least one."""
        return self._shape(size) * self._scale_of(size)

    def _scale_of(self, size: int) -> float:
        count, mean = self._own.get(size, _NONE)
        return (count * mean + _PRIOR * self._scale) / (count + _PRIOR)

    def _shape(self, size: int) -> float:
        shapes = self._shapes
        found = shapes.get(size)
        if found is None:
            found = shapes[size] = self._between(size)
        return found

    def _between(self, size: int) -> float:
        place = bisect_left(self._sizes, size)
        if place == len(self._sizes):
            return self._trials[self._sizes[-1]] * size / self._sizes[-1]
        above = self._sizes[place]
        if above == size or not place:
            return self._trials[above]
        below = self._sizes[place - 1]
        low, high = self._trials[below], self._trials[above]
        return low + (high - low) * (size - below) / (above - below)


@dataclass(frozen=True)
class Curves:
    """Of the three models: versions differ in numbers, not in what they cost."""

    large: Curve = field(default_factory=Curve)
    tuned: Curve = field(default_factory=Curve)
    base: Curve = field(default_factory=Curve)
