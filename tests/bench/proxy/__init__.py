"""`make bench NAME=proxy`: how fast the ensemble writes, and what its answers are worth.

PART=speed or PART=quality runs one of the two; quality.py says what else can be set.
"""

import os

from tests.bench.figure import Figure


async def figures() -> list[Figure]:
    from tests.bench.proxy import quality, speed

    parts = {"speed": speed.figures, "quality": quality.figures}
    wanted = os.environ.get("PART") or ""
    if wanted and wanted not in parts:
        raise SystemExit(f"proxy: no PART {wanted!r}; there are speed and quality")
    return [
        figure for name, part in parts.items() if wanted in ("", name) for figure in await part()
    ]
