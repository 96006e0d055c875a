"""`python -m tests.chaos.live`: schedules over real processes, and what came of them as JSON lines.

--schedules N    how many; their seeds are --seed, --seed + 1, ...
--seed S         draws the same plan again: what a violation prints
--parallel N     side by side
"""

import argparse
import asyncio
import json
import os
import sys
import time

from shared.logs import configure
from tests.chaos.live.many import figures as live_figures
from tests.chaos.live.many import reports_of
from tests.chaos.live.plan import a_plan
from tests.chaos.many import figures
from tests.chaos.telling import say, tell
from tests.chaos.world import Report

LAST_LINES = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.live")
    parser.add_argument("--schedules", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=2)
    given = parser.parse_args()
    configure("chaos", level="critical")
    plans = [a_plan(seed) for seed in range(given.seed, given.seed + given.schedules)]
    began = time.perf_counter()
    reports = asyncio.run(reports_of(plans, given.parallel, tell_live))
    found = figures(reports, time.perf_counter() - began)
    for figure in (*found, *live_figures(reports)):
        say(figure.line())
    broken = sorted(report.seed for report in reports if report.violations)
    say(json.dumps({"broken": broken, "runs_on": "processes"}))
    return 1 if broken else 0


def tell_live(report: Report) -> None:
    """What broke, with its plan, and on stderr what the processes logged."""
    if report.violations:
        tell(report, "tests.chaos.live", a_plan(report.seed).text(), LAST_LINES)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main())
