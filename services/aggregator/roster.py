"""Which parts of which devices the remembered rounds have counted.

A name is kept once for all rounds of a job, and four bytes for each round: a hundred thousand
devices may take part in every round, and a round is remembered until nobody can be late.
"""

from array import array
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

PARTS = 31
"""So many parts of a device fit its four bytes; more are rare."""
SPARE = 4096
"""So many names that no remembered round knows are not worth a clean-up."""


class Roster:
    """The devices of a job, numbered as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, device: str) -> int:
        return self.numbers.setdefault(device, len(self.numbers))

    def forget(self, rounds: "Collection[Counted]") -> None:
        """Names that none of `rounds` knows are gone, if they are more than those that stay."""
        used = np.zeros(len(self.numbers), np.bool_)
        for one in rounds:
            used |= one.masks(len(used)) != 0
        if 2 * int(used.sum()) + SPARE > len(used):
            return
        for one in rounds:
            one.replace(one.masks(len(used))[used])
        kept = [name for name, number in self.numbers.items() if used[number]]
        self.numbers = {name: number for number, name in enumerate(kept)}


class Counted:
    """What one round has counted, by device and part."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._masks = array("I")
        self._beyond: set[tuple[str, int]] = set()

    def has(self, device: str, part: int) -> bool:
        if part >= PARTS:
            return (device, part) in self._beyond
        return bool(self._mask(device) >> (part + 1) & 1)

    def add(self, device: str, part: int) -> None:
        if part >= PARTS:
            self._beyond.add((device, part))
        else:
            self._mark(device, 2 << part)

    def delivers(self, device: str) -> bool:
        """Note that the device has delivered probes in time; whether that is news."""
        news = not self._mask(device) & 1
        self._mark(device, 1)
        return news

    def clear(self) -> None:
        self._masks = array("I")
        self._beyond.clear()

    def masks(self, count: int) -> NDArray[np.uint32]:
        """The bits of the first `count` numbers: (count,) uint32."""
        found = np.zeros(count, np.uint32)
        found[: len(self._masks)] = np.array(self._masks, np.uint32)
        return found

    def replace(self, masks: NDArray[np.uint32]) -> None:
        self._masks = array("I", masks.tobytes())

    def _mask(self, device: str) -> int:
        number = self._roster.numbers.get(device, -1)
        return self._masks[number] if 0 <= number < len(self._masks) else 0

    def _mark(self, device: str, bits: int) -> None:
        number = self._roster.number(device)
        if number >= len(self._masks):
            self._masks.frombytes(bytes(4 * (number + 1 - len(self._masks))))
        self._masks[number] |= bits
