"""A series of numbers as a line of small bars. Pure."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
PLAIN = "_.-=+*#@"
"""For terminals and files that take ASCII only."""
WIDTH = 32


def sparkline(values: Sequence[float], *, bars: str = BARS, width: int = WIDTH) -> str:
    """A bar for each value between the lowest and the highest of them, `width` at most.

    Longer series are thinned to their first, their last and what lies evenly between.
    """
    shown = _thinned(values, width)
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    reach = high - low or 1.0
    return "".join(bars[round((value - low) / reach * (len(bars) - 1))] for value in shown)


def bars_for(encoding: str) -> str:
    """The bars that an encoding can write."""
    try:
        BARS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return BARS


def _thinned(values: Sequence[float], width: int) -> Sequence[float]:
    if len(values) <= width:
        return values
    last = len(values) - 1
    return [values[round(place * last / (width - 1))] for place in range(width)]
