"""Durations as people write them: 90s, 30m, 24h, 7d."""

import re

from services.console.failure import Usage

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str, option: str) -> float:
    """
    Raises:
        Usage: it is none; names `option`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise Usage(f"{option} {text!r}: write 90s, 30m, 24h or 7d")
    return float(match[1]) * _SECONDS[match[2]]
