"""`make bench NAME=...`: one JSON line a figure."""

import asyncio
import importlib
import sys

from shared.logs import configure
from tests.bench.figure import Figure

NAMES = (
    "wire",
    "edge",
    "close",
    "fold",
    "install",
    "serve",
    "recovery",
    "crowd",
    "herd",
    "away",
    "late",
    "learn",
    "proxy",
)


def main() -> int:
    names = sys.argv[1:] or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    configure("bench", level="error")
    for name in names:
        figures: list[Figure] = asyncio.run(
            importlib.import_module(f"tests.bench.{name}").figures()
        )
        for figure in figures:
            print(figure.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
