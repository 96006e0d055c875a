"""How a run of schedules tells of itself: JSON lines on stdout, what led to a break on stderr."""

import json
import sys

from tests.chaos.world import Report


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tell(report: Report, program: str, faults: list[str], last_lines: int) -> None:
    """What broke, how `program` repeats it, and the end of what then happened."""
    record = {
        "broken": report.seed,
        "repeat": f"python -m {program} --seed {report.seed} --schedules 1",
        "violations": report.violations[:10],
        "faults": faults,
    }
    say(json.dumps(record))
    sys.stderr.write("\n".join([f"seed {report.seed}:", *report.trace[-last_lines:], ""]))
