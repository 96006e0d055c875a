"""`python -m tests.chaos`: many schedules, and what came of them as JSON lines.

--schedules N    how many; their seeds are --seed, --seed + 1, ...
--seed S         repeats a schedule exactly: what a violation prints
--processes N    side by side
"""

import argparse
import json
import os
import sys
import time

from shared.logs import configure
from tests.chaos.faults import scenario
from tests.chaos.many import figures, reports_of
from tests.chaos.world import shrunk

SHOWN = 3
"""So many violations are shrunk and told in full."""
LAST_LINES = 80


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.schedules)
    began = time.perf_counter()
    configure("chaos", level="critical")
    reports = reports_of(seeds, given.processes)
    seconds = time.perf_counter() - began
    broken = sorted(report.seed for report in reports if report.violations)
    for seed in broken[:SHOWN]:
        _tell(seed)
    for figure in figures(reports, seconds):
        _say(figure.line())
    _say(json.dumps({"seeds": [seeds.start, seeds.stop - 1], "broken": broken}))
    return 1 if broken else 0


def _tell(seed: int) -> None:
    """The seed that broke something, the fewest faults that do, and what then happened."""
    fewest, report = shrunk(scenario(seed))
    record = {
        "seed": seed,
        "violations": report.violations[:10],
        "faults": [fault.text() for fault in fewest.faults],
        "repeat": f"python -m tests.chaos --seed {seed} --schedules 1",
        "trace": report.trace[-LAST_LINES:],
    }
    _say(json.dumps(record, indent=1))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main())
